"""examples/rebuilt: episodes of several sequences, from the engine to the loss and to an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rapo.cli import main
from megatron_rapo.config.load import load_config
from megatron_rapo.data.batching import Sample
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.data.tasks import countdown
from megatron_rapo.data.token_texts import TokenTexts
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.evaluation.store import Evaluation
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.experience.summary import summarise
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.policy.batch import make_samples
from megatron_rapo.report.responses import EvaluatedSamples, Sampled, browse
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling
from tests.dialogues import tiny
from tests.methods import a_method
from tests.stand_in import StandIn, stand_ins

ROOT = Path(__file__).parents[2]
EOS, VOCABULARY = tiny().eos_token_id, len(tiny())
POSED = [countdown.pose([3, 7, number], 10 + number) for number in (1, 2, 3)]
PROMPTS = [
    Prompt(n, posed.question, tuple(tiny().encode(posed.question)), posed.answer, draw=n)
    for n, posed in enumerate(POSED)
]
RESPONSES, LONGEST = 4, 64


def say(server: StandIn, body: dict[str, Any]) -> list[dict[str, Any]]:
    """By the seed a note of one or two digits, or an answer, which is right or not."""
    made = []
    for prompt, params in zip(body["input_ids"], body["sampling_params"], strict=True):
        seed = params["sampling_seed"]
        third = tiny().decode(prompt).split("=")[0].split()[2]
        said = ["7\n", "10\n", "4\n", f"7+3+{third}", "7"][seed % 5]
        ids = [*tiny().encode(said), *([] if said.endswith("\n") else [EOS])]
        meta = {
            "finish_reason": {"type": "stop"},
            "weight_version": server.version,
            "output_token_logprobs": [[-0.5 - seed % 97, token, None] for token in ids],
        }
        made.append({"text": "", "output_ids": ids, "meta_info": meta})
    return made


async def judge(answer: str, problem: Problem) -> Verification:
    right = countdown.is_correct(answer, problem.answer)
    return Verification(Outcome.CORRECT if right else Outcome.WRONG)


@pytest.fixture(scope="module")
def played() -> tuple[list[Group], list[tuple[list[int], list[int]]]]:
    """Groups; and what the engine was asked to continue, with what it said."""
    run = load_config([ROOT / "examples/rebuilt/run.toml"])
    said: list[tuple[list[int], list[int]]] = []
    with stand_ins(1) as ([server], urls):

        def generate(body: dict[str, Any]) -> list[dict[str, Any]]:
            answers = say(server, body)
            said.extend(zip(body["input_ids"], (one["output_ids"] for one in answers), strict=True))
            return answers

        server.generate = generate
        pool = EnginePool(
            urls, SGLangClient, vocab_size=VOCABULARY, prompts_per_request=4, request_timeout=60
        )
        episodes = EpisodeRunner(open_environment(run), run.environment, tiny(), 1.0, VOCABULARY)
        with pool, Runner(episodes, pool) as runner:
            groups = runner.run(PROMPTS, Sampling(RESPONSES, LONGEST, 1.0, weight_version=3, seed=2), judge)
    return [group for group in groups if group is not None], said


def test_each_sequence_is_a_context_and_exactly_what_was_sampled_behind_it(played: Any) -> None:
    groups, said = played
    found = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group.episodes:
            note: list[int] = []
            for sequence in one.episode.sequences:
                context = [*prompt.token_ids, *note]
                assert sequence.token_ids[: len(context)].tolist() == context
                note = sequence.token_ids[len(context) :].tolist()
                assert sequence.sampled.tolist() == [False] * len(context) + [True] * len(note)
                found.append((context, note))
    assert sorted(found) == sorted(said), "all that was sampled, once"
    rounds = {len(one.episode.sequences) for group in groups for one in group.episodes}
    assert rounds == {1, 2, 3}


def test_sequences_share_the_episode_s_advantage_which_counts_it_once(played: Any) -> None:
    """Advantages are those of one reward an episode, whatever its number of sequences."""
    groups, _ = played
    rewards = np.array([group.rewards for group in groups])
    assert 0 < rewards.mean() < 1
    expected = [
        advantage
        for group, row in zip(groups, standardised(rewards), strict=True)
        for one, advantage in zip(group.episodes, row, strict=True)
        for _ in one.episode.sequences
    ]
    assert [sample.advantage for sample in samples(groups)] == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_an_episode_weighs_as_one_response_of_all_its_sampled_tokens(played: Any, aggregation: str) -> None:
    groups, _ = played
    episodes = [one.episode for group in groups for one in group.episodes]
    total = sum(episode.sampled_tokens for episode in episodes)
    of_token = {
        "sequence_mean": lambda episode: 1 / (len(episodes) * episode.sampled_tokens),
        "token_mean": lambda episode: 1 / total,
        "constant": lambda episode: 1 / (len(episodes) * LONGEST),
    }[aggregation]
    expected = [of_token(episode) for episode in episodes for _ in episode.sequences]
    assert [one.token_weight for one in samples(groups, loss_aggregation=aggregation)] == pytest.approx(
        expected
    )


def test_metrics_count_episodes(played: Any) -> None:
    groups, _ = played
    found = summarise(Batch(groups, Shared(groups), 0), VOCABULARY)
    episodes = [one.episode for group in groups for one in group.episodes]
    assert len(episodes) == len(PROMPTS) * RESPONSES < sum(len(one.sequences) for one in episodes)
    assert found["reward/mean"] == np.mean([group.rewards for group in groups])
    assert found["rollout/response_tokens_mean"] == np.mean([one.sampled_tokens for one in episodes])
    assert found["environment/rounds"] == np.mean([len(one.sequences) for one in episodes])


def test_an_evaluation_counts_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with stand_ins(1) as ([server], urls):
        server.generate = lambda body: say(server, body)
        settings = [
            f'rollout.engine={{kind = "sglang", urls = ["{urls[0]}"]}}',
            "evaluate.problems=3",
            "reward.workers=1",
        ]
        out = ["--out", str(tmp_path / "out"), "--samples", "4", "--k", "1", "4"]
        assert main(["evaluate", "examples/rebuilt/run.toml", *out, "--set", *settings]) == 0
        asked = sum(len(body["input_ids"]) for path, body in server.asked if path == "/generate")
    stored = Evaluation.open(tmp_path / "out").samples("countdown", "t1")
    counts = stored.counts()
    assert counts.samples.tolist() == [4] * 3
    rows = stored.read(["sequences", "token_ids", "length", "given"]).to_pylist()
    assert sum(len(row["sequences"] or [row]) for row in rows) == asked > len(rows) == 12
    for row in rows:
        parts = [np.array(one["log_probs"]) for one in row["sequences"] or []]
        assert row["length"] == (sum(np.isfinite(one).sum() for one in parts) or len(row["token_ids"]))
        assert row["given"] == sum(np.isnan(one).sum() for one in parts) - sum(
            np.isnan(parts[0]) if parts else []
        )
    browser = browse([Sampled("base", "countdown", EvaluatedSamples(stored), TokenTexts(tiny()))])
    json.dumps(browser.data, allow_nan=False)  # what the page reads
    responses = [one for problem in browser.data["problems"] for one in problem["responses"]]
    several = [one for one in responses if "starts" in one]
    assert several and all(one["given"] == one["log_probs"].count(None) > 0 for one in several)


def samples(groups: list[Group], **options: Any) -> list[Sample]:
    """One of each sequence, in order."""
    method = a_method(max_response_tokens=LONGEST, **options)
    [minibatch] = make_samples(groups, method, VOCABULARY, len(groups))
    return minibatch
