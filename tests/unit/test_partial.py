"""Partial responses: which version of the weights samples which token, and what a killed run goes on with.

Engines here follow a script: the first token of a response tells how long it becomes, and a token's log-prob
tells its place and the version that sampled it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_rapo.ahead.keeping import keep, take_up
from megatron_rapo.ahead.partial import PartialBatches
from megatron_rapo.ahead.unfinished import keep_unfinished, take_up_unfinished
from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.config.load import validate
from megatron_rapo.config.sampling import Rollout
from megatron_rapo.data.order import PromptOrder
from megatron_rapo.data.prompts import LoadReport, Prompt, PromptSet
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.environments.single_turn import SingleTurn
from megatron_rapo.episode.environment import Generate, Transcript
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.score import Score
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.carried import Carried
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.experience.summary import staleness
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.revival import Reviver
from tests.methods import a_method
from tests.stand_in import VOCAB, StandIn, stand_ins
from tests.unit.test_configuration import refusal, with_options
from tests.unit.test_environments import Sequential
from tests.unit.test_replay import alone
from tests.unit.test_samples import placement

STEPS, PROMPTS, RESPONSES, TOKENS = 7, 3, 4, 4
LONGEST = 28


def scripted(server: StandIn) -> StandIn:
    """Makes a stand-in follow the script; a response of length n has the places 2 to n + 1."""
    server.sampled = Counter()

    def generate(body: Any) -> Any:
        found = []
        for ids, params in zip(body["input_ids"], body["sampling_params"], strict=True):
            length = 1 + params["sampling_seed"] % (LONGEST - 1) if len(ids) == 2 else ids[2] - 10
            places = list(range(len(ids), max(length + 2, len(ids) + 1)))
            made = places[: params["max_new_tokens"]]
            tokens = [10 + length if place == 2 else place % 10 for place in made]
            server.sampled.update((tuple(ids[:3]) if len(ids) > 2 else (*ids, tokens[0]), p) for p in made)
            meta = {
                "finish_reason": {"type": "stop" if made == places else "length"},
                "weight_version": server.version,
                "output_token_logprobs": [
                    [-int(server.version) - place / 64, token, None]
                    for place, token in zip(made, tokens, strict=True)
                ],
            }
            found.append({"text": "", "output_ids": tokens, "meta_info": meta})
        return server.change(found)

    server.generate = generate
    return server


class Turns:
    """Turns of five tokens, with a given one between, until the script ends."""

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        transcript = Transcript(problem.token_ids)
        for number in itertools.count():
            turn = await generate(transcript.token_ids, turn=number, max_tokens=5)
            transcript.add_turn(turn)
            if turn.finish == "stop" or generate.tokens_left(transcript.token_ids) < 2:
                break
            transcript.add_given([45])
        told = await generate.recorded("seed", lambda: answer(seed))
        return Episode((transcript.sequence(),), turn.text, Score(float(told % 2)))


async def answer(value: int) -> int:
    return value


async def judge(answer: str, problem: Problem) -> Verification:
    return Verification(Outcome.CORRECT if len(answer) % 2 else Outcome.WRONG)


class Run:
    """A run of steps that do nothing but take their batches, and keep a checkpoint after each."""

    def __init__(
        self,
        ahead: int,
        folder: Path,
        servers: list[StandIn],
        pool: EnginePool,
        runner: Runner,
        reviver: Reviver,
    ) -> None:
        self.folder, self.servers = folder, servers
        prompts = tuple(Prompt(index, f"{index}?", (index % 9 + 1, 7), "") for index in range(50))
        report = LoadReport("test", 50, 50, (), (), (), 10, ())
        self.prompts = PromptOrder(PromptSet(prompts, report), seed=0, shuffle=True)
        rollout = SimpleNamespace(prompts_per_step=PROMPTS, max_staleness=ahead, partial_tokens=TOKENS)
        algorithm = SimpleNamespace(method="grpo")
        config = SimpleNamespace(
            rollout=rollout, run=SimpleNamespace(seed=7, steps=STEPS), algorithm=algorithm
        )
        engines = SharedEngines(alone_with_engines(), pool, reviver)
        self.collector = Collector(alone_with_engines(), engines, runner, judge, self.recover)
        self.recovered: list[int] = []
        self.fails_with = -1  # the version with which all engines are lost
        self.checked: list[int] = []
        self.batches = PartialBatches(
            cast(Any, config),
            a_method("grpo", max_response_tokens=LONGEST),
            self.prompts,
            Carried(self.collector, PROMPTS),
            phase=lambda name: nullcontext(),
            check=lambda step, sampled: self.checked.append(step),
            answers=lambda step: None,
        )

    def recover(self, version: int) -> None:
        self.recovered.append(version)
        for server in self.servers:
            server.change = lambda found: found
        self.collector.engines.revive()
        self.publish(version)

    def publish(self, version: int) -> None:
        for server in self.servers:
            server.version = str(version)
            if version == self.fails_with:
                server.change = _abort

    def go(self, first: int = 1, last: int = STEPS) -> dict[int, Batch]:
        found = {}
        for step in range(first, last + 1):
            found[step] = self.batches.take(step)
            self.batches.settle(step)
            self.publish(step)
            position = self.prompts.position
            self.batches.run_ahead(step)
            checkpoint = self.folder / str(step)
            checkpoint.mkdir(parents=True)
            keep(self.batches.ready, checkpoint, alone())
            keep_unfinished(self.batches.unfinished, checkpoint, alone())
            (checkpoint / "position").write_text(str(position))
        return found

    def resume(self, step: int) -> None:
        checkpoint = self.folder / str(step)
        ready = take_up(checkpoint, self.prompts, alone(), prompts_per_step=PROMPTS, whole=False)
        unfinished = take_up_unfinished(checkpoint, prompts_per_step=PROMPTS, partial_tokens=TOKENS)
        self.batches.go_on(step, ready, unfinished)
        self.prompts.position = int((checkpoint / "position").read_text())
        self.publish(step)
        self.batches.run_ahead(step)


def _abort(found: Any) -> Any:
    raise ConnectionAbortedError


def alone_with_engines() -> Any:
    place = alone()
    place.share_from_main = lambda mine: mine
    return place


@contextmanager
def a_run(
    ahead: int,
    folder: Path,
    kind: type[SGLangClient] = SGLangClient,
    environment: Any = None,
    engines: int = 2,
) -> Iterator[Run]:
    reviver = Reviver(None, cast(Any, None), restarts=9, startup_timeout=20)  # servers name no model here
    tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: "a" * len(ids))
    with (
        stand_ins(engines) as (servers, urls),
        EnginePool(
            urls,
            kind,
            vocab_size=VOCAB,
            prompts_per_request=2,
            request_timeout=60,
            requests_per_engine=4,
            reviver=reviver,
        ) as pool,
        Runner(
            EpisodeRunner(
                environment or SingleTurn(),
                EnvironmentOptions(**({"use": "mine:Turns", "max_turns": 9} if environment else {})),
                tokenizer,
                1.0,
                VOCAB,
            ),
            pool,
        ) as runner,
    ):
        run = Run(ahead, folder, list(map(scripted, servers)), pool, runner, reviver)
        run.publish(0)
        try:
            yield run
        finally:
            run.batches.close()


def expected_versions(step: int, ahead: int, tokens: int) -> list[int]:
    """Of each sampled token of an episode: so many of each version, and the last one samples the rest."""
    oldest, newest = max(0, step - 1 - ahead), max(0, step - 2)
    return [min(oldest + token // TOKENS, newest) for token in range(tokens)]


def told(batch: Batch) -> Any:
    """All that a step reads of a batch."""
    episodes = [
        (
            one.verification,
            sequence.token_ids.tolist(),
            sequence.log_probs.tolist(),
            sequence.versions.tolist(),
        )
        for _, group in sorted(batch.sampled.whole.items())
        for one in group.episodes
        for sequence in cast(Episode, one.episode).sequences
    ]
    problems = [group.problem for group in batch.groups]
    return batch.first, batch.temperature, problems, repr(episodes)


CASES = [
    *itertools.product([2, 3], [SGLangClient, Sequential], [None]),
    (3, SGLangClient, Turns()),
    (2, Sequential, Turns()),
]


@pytest.mark.parametrize(("ahead", "kind", "environment"), CASES)
def test_each_token_is_of_the_version_that_is_its_turn(
    ahead: int, kind: type[SGLangClient], environment: Any, tmp_path: Path
) -> None:
    with a_run(ahead, tmp_path, kind, environment) as run:
        found = run.go()
        trained: Counter[Any] = Counter()
        for step, batch in found.items():
            assert batch.first == PROMPTS * (step - 1), "a step has the prompts that are its own"
            for group in batch.sampled.whole.values():
                for one in group.episodes:
                    [sequence] = cast(Episode, one.episode).sequences
                    places, versions = np.flatnonzero(sequence.sampled), sequence.versions[sequence.sampled]
                    assert versions.tolist() == expected_versions(step, ahead, len(places))
                    assert sequence.log_probs[places].tolist() == (-versions - places / 64).tolist()
                    ids = sequence.token_ids.tolist()
                    assert ids[places[-1]] == (places[-1] % 10 if places[-1] > 2 else 10 + ids[2] - 10)
                    assert places[-1] >= ids[2] - 10 + 1 or places[-1] + 1 == LONGEST + 2
                    trained.update((tuple(ids[:3]), int(place)) for place in places)
        assert sum((server.sampled for server in run.servers), Counter()) == trained, "each token once"
        seeds = [
            params["sampling_seed"]
            for server in run.servers
            for path, body in server.asked
            if path == "/generate"
            for params in body["sampling_params"]
        ]
        assert len(set(seeds)) == len(seeds), "each piece has random numbers of its own"
        assert run.checked == list(range(1, STEPS + 1))
        assert run.batches.ready == run.batches.unfinished == {}
        assert run.prompts.position == STEPS * PROMPTS


@pytest.mark.parametrize("environment", [None, Turns()])
@pytest.mark.parametrize("step", [1, 2, 4, 6])
def test_a_run_that_was_killed_trains_on_the_same(environment: Any, step: int, tmp_path: Path) -> None:
    with a_run(3, tmp_path / "whole", environment=environment) as run:
        undisturbed = run.go()
    with a_run(3, tmp_path / "killed", environment=environment) as run:
        run.go(last=step)
        assert bool(run.batches.unfinished) == (step < STEPS - 1)
    with a_run(3, tmp_path / "killed", environment=environment) as run:
        run.resume(step)
        again = run.go(step + 1)
        kept = sum(sum(server.sampled.values()) for server in run.servers)
    assert {n: told(one) for n, one in again.items()} == {
        n: told(one) for n, one in undisturbed.items() if n > step
    }
    tokens = sum(
        cast(Episode, one.episode).sampled_tokens
        for batch in again.values()
        for group in batch.sampled.whole.values()
        for one in group.episodes
    )
    assert kept < tokens, "what was sampled before the kill was not sampled again"


def test_what_lost_engines_leave_open_goes_on_once_they_are_back(tmp_path: Path) -> None:
    """With the weights that there are then; what was sampled before stays."""
    with a_run(3, tmp_path / "whole") as run:
        undisturbed = run.go()
    with a_run(3, tmp_path / "lost") as run:
        run.fails_with = 2
        found = run.go()
        assert run.recovered == [3]
    for step, batch in found.items():
        pairs = zip(batch.sampled.whole.values(), undisturbed[step].sampled.whole.values(), strict=True)
        for group, other in pairs:
            for one, same in zip(group.episodes, other.episodes, strict=True):
                [sequence], [known] = (
                    cast(Episode, one.episode).sequences,
                    cast(Episode, same.episode).sequences,
                )
                places = np.flatnonzero(sequence.sampled)
                assert sequence.token_ids.tolist() == known.token_ids.tolist()
                assert (
                    sequence.log_probs[places].tolist() == (-sequence.versions[places] - places / 64).tolist()
                )
                late = sequence.versions[places] - known.versions[places]
                assert (late >= 0).all() and late.max() <= 1 and (sequence.versions[places] < step).all()
    assert any(told(found[step]) != told(undisturbed[step]) for step in found), "nothing was lost"


def test_one_lost_engine_changes_nothing(tmp_path: Path) -> None:
    with a_run(3, tmp_path / "whole") as run:
        undisturbed = run.go()
    with a_run(3, tmp_path / "lost") as run:
        found = run.go(last=2)
        run.servers[0].fault = "closed"
        found |= run.go(3)
        assert len(run.collector.engines.pool.urls) == 1 and not run.recovered
    assert {n: told(one) for n, one in found.items()} == {n: told(one) for n, one in undisturbed.items()}


def test_what_no_version_is_left_for_is_told(tmp_path: Path) -> None:
    with a_run(3, tmp_path) as run:
        found = run.go()
    batch = found[6]
    lengths = [one.episode.sampled_tokens for group in batch.groups for one in group.episodes]
    by_version = Counter(version for length in lengths for version in expected_versions(6, 3, length))
    metrics = staleness(batch, 5, TOKENS)
    assert {steps: metrics[f"rollout/staleness/{steps}"] for steps in (1, 2, 3)} == {
        5 - version: count / sum(lengths) for version, count in by_version.items()
    }
    assert metrics["rollout/carried_over"] == np.mean([length > TOKENS for length in lengths])
    assert metrics["rollout/beyond_partial_tokens"] == np.mean([length > 3 * TOKENS for length in lengths])
    assert 0 < metrics["rollout/beyond_partial_tokens"] < metrics["rollout/carried_over"] < 1
    assert metrics["rollout/staleness_max"] == 3
    assert set(staleness(batch, 5)) == {"rollout/staleness_mean", "rollout/staleness_max"}


def test_an_engine_s_refusal_ends_the_run(tmp_path: Path) -> None:
    with a_run(2, tmp_path) as run:
        run.go(last=1)
        for server in run.servers:
            server.answers["/generate"] = (400, b"no such model")
        with pytest.raises(RapoError, match="no such model"):
            run.go(2)


def test_an_episode_that_asks_for_something_else_is_sampled_again(tmp_path: Path) -> None:
    """Its environment may not repeat itself; what is trained on is what was sampled, all the same."""
    with a_run(2, tmp_path, environment=Turns()) as run:
        run.go(last=3)

    class Others(Turns):
        async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
            transcript = Transcript(problem.token_ids)
            transcript.add_given([3, 45])
            transcript.add_turn(await generate(transcript.token_ids))
            return Episode((transcript.sequence(),), "", Score(1.0))

    with a_run(2, tmp_path, environment=Others()) as run:
        run.resume(3)
        batch = run.go(4, 5)[5]
        for group in batch.sampled.whole.values():
            for one in group.episodes:
                [sequence] = cast(Episode, one.episode).sequences
                assert (sequence.versions[sequence.sampled] == 3).all()


def test_what_several_heads_kept_is_one_batch(tmp_path: Path) -> None:
    """So that a run may go on with another number of heads."""
    with a_run(2, tmp_path) as run:
        run.go(last=1)
        whole = run.batches.unfinished
    for head in (0, 1):
        shares = {
            number: replace(one, so_far={p: turns for p, turns in one.so_far.items() if p % 2 == head})
            for number, one in whole.items()
        }
        keep_unfinished(shares, tmp_path, placement(head, 2))
    found = take_up_unfinished(tmp_path, prompts_per_step=PROMPTS, partial_tokens=TOKENS)
    assert repr(
        {number: replace(one, so_far=dict(sorted(one.so_far.items()))) for number, one in found.items()}
    ) == repr(dict(whole))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompts_per_step": PROMPTS + 1}, "prompts_per_step is 4"),
        ({"partial_tokens": None}, "partial_tokens None; go on with the former values"),
    ],
)
def test_a_checkpoint_of_other_batches_is_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    with a_run(2, tmp_path) as run:
        run.go(last=1)
    options = {"prompts_per_step": PROMPTS, "partial_tokens": TOKENS, **changes}
    with pytest.raises(RapoError, match=rf"3 prompts for step 3 whose responses are not finished.*{why}"):
        take_up_unfinished(tmp_path / "1", **options)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with a_run(2, tmp_path) as run:
        run.go(last=1)
    (tmp_path / "1/ahead/unfinished-000.parquet").write_bytes(b"no parquet")
    with pytest.raises(RapoError, match=r"unfinished-000.parquet cannot be read"):
        take_up_unfinished(tmp_path / "1", prompts_per_step=PROMPTS, partial_tokens=TOKENS)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_staleness": 1}, r"partial_tokens = 8 has several versions .* max_staleness = 1 leaves one"),
        ({"max_staleness": 2, "max_response_tokens": 8}, "partial_tokens = 8 would have no effect"),
        ({"max_staleness": 2, "dynamic_sampling": {}}, "does not go with dynamic_sampling"),
        ({"max_staleness": 2, "partial_tokens": 0}, "greater than 0"),
    ],
)
def test_partial_responses_are_refused_where_they_cannot_be(options: dict[str, Any], why: str) -> None:
    given = {"prompts_per_step": 1, "max_response_tokens": 16, "partial_tokens": 8}
    Rollout(**given, max_staleness=2)
    with pytest.raises(ValueError, match=why):
        Rollout(**{**given, **options})


def test_methods_that_ask_for_more_are_refused() -> None:
    rollout = {"max_response_tokens": 64, "max_staleness": 2, "partial_tokens": 8}
    expo = with_options(algorithm={"method": "expo"})
    expo["rollout"] |= rollout
    assert "partial_tokens = 8 does not go with method expo, which asks for further responses" in refusal(
        expo
    )
    plain = with_options()
    plain["rollout"] |= rollout
    assert validate(plain, source="run.toml").rollout.partial_tokens == 8
