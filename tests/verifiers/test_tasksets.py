"""Two of verifiers' own tasksets, its harness and its rewards, as they are: played, and trained on."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_rapo.cli import main
from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.write import to_toml
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.engine import Connect
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.vllm.client import VLLMClient
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.outcome import Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling
from megatron_rapo.wire.access import API_KEY_VARIABLE
from tests.dialogues import SamplingIds, byte_level
from tests.end_to_end.command import metrics, run
from tests.engines.servers import EMBEDDED, KEY, SGLANG_CPU, VLLM_CPU, running, why_not
from tests.leftovers import nothing_left
from tests.models import make_hf_model
from tests.verifiers.resource_server import ROW, resource_server

PYTHON = Path(__file__).parents[2] / ".venv-verifiers/bin/python"
pytestmark = pytest.mark.skipif(
    not PYTHON.with_name("uv").exists(), reason="there is no .venv-verifiers; `make verifiers` installs it"
)
WORD = "stone"
MAX_TURNS = 3
HANGMAN = {"id": "textarena", "game": "Hangman-v0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that speaks Qwen3's chats."""
    tokenizer = byte_level()
    size = max(tokenizer.get_vocab().values()) + 1
    folder = tmp_path_factory.mktemp("models") / "policy"
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    wide: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}  # vLLM's kernels for CPUs have no heads of 16
    make_hf_model(folder, vocab_size=size, num_hidden_layers=2, max_position_embeddings=4096, **wide, **ends)
    tokenizer.save_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**told, "unk_token": None}))  # as Qwen's own
    return folder


@pytest.fixture(autouse=True)
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of Hangman, which TextArena would download."""
    folder = tmp_path / "nltk/corpora/words"
    folder.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (folder / name).write_text(f"{WORD}\n")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))


def configured(
    folder: Path,
    model: Path,
    taskset: dict[str, Any],
    agent: str,
    env: dict[str, Any] | None = None,
) -> RunConfig:
    """A run in an environment of verifiers."""
    seat = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}, "sampling": {"max_tokens": 24}}
    options = {
        "python": str(PYTHON),
        "renderer": "qwen3",
        "renderer_options": {"thinking_retention": "all"},
        "env": {"taskset": taskset, agent: seat, **(env or {})},
    }
    config = load_config(
        [
            {
                "run": {"directory": str(folder / "run"), "steps": 2},
                "model": {"path": str(model), "dtype": "float32"},
                "data": {"source": "file", "path": str(folder / "tasks.jsonl")},
                "environment": {"use": "verifiers", "max_turns": MAX_TURNS, "options": options},
                "rollout": {
                    "prompts_per_step": 1,
                    "responses_per_prompt": 2,
                    "max_prompt_tokens": 1024,
                    "max_response_tokens": 800,
                    "engine": {"kind": "embedded"},
                },
                "algorithm": {"minibatch_prompts": 1, "max_tokens_per_microbatch": 4096},
            }
        ]
    )
    (folder / "run.toml").write_text(to_toml(config))
    return config


def write_tasks(folder: Path) -> None:
    """As a user does before the run."""
    tasks = ["--count", "2", "--output", str(folder / "tasks.jsonl")]
    assert main(["tasks", str(folder / "run.toml"), *tasks]) == 0


def play(config: RunConfig, *scripts: Sequence[str]) -> list[Episode]:
    """Episodes of the first task, in which the policy says these turns; each is one sequence."""
    episodes = attempt(config, *scripts)
    for generate, episode in episodes:
        assert isinstance(episode, Episode), episode
        [sequence] = episode.sequences
        generate.check(sequence)
    return [episode for _, episode in episodes]


def attempt(config: RunConfig, *scripts: Sequence[str]) -> list[tuple[SamplingIds, Any]]:
    """What sampled, and the episodes, or what they raised."""
    rows = config.data.path.read_text().splitlines()  # type: ignore[union-attr]
    problem = Problem("0", "?", token_ids=(1, 2), columns=json.loads(rows[0]))
    tokenizer = byte_level()
    generates = [
        SamplingIds(
            tokenizer,
            [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in script],
            problem.token_ids,
            3000,
        )
        for script in scripts
    ]

    async def whole(environment: Any) -> list[Any]:
        running = [environment.run(problem, one, 0) for one in generates]
        try:
            return await asyncio.gather(*running, return_exceptions=True)
        finally:
            await environment.aclose()

    with nothing_left():
        return list(zip(generates, asyncio.run(whole(open_environment(config))), strict=True))


def text_of(episode: Episode) -> str:
    return byte_level().decode(episode.sequences[0].token_ids)


def test_a_game_of_textarena_is_played_to_its_end(tmp_path: Path, model: Path) -> None:
    config = configured(tmp_path, model, HANGMAN, "player")
    write_tasks(tmp_path)
    episode, lost = play(config, ["I try [S].", f"It must be [{WORD}]."], ["[X]"] * 9)
    assert episode.score is not None
    assert (episode.score.value, episode.score.facts) == (1.0, {"game_reward": 1.0})
    assert episode.facts["turns"] == 2 and episode.facts["sequences"] == 1
    board = r"I try \[S\]\.<\|im_end\|>\n<\|im_start\|>user\nC00.*  S   _ .*<\|im_end\|>"
    assert re.search(board, text_of(episode), re.S)
    assert lost.score is not None and lost.score.value == 0.0
    assert lost.facts["turns"] == MAX_TURNS and lost.facts["refused"] == 0, "verifiers knows the limit"


def test_tools_of_nemo_gym_are_called_and_its_server_gives_the_reward(tmp_path: Path, model: Path) -> None:
    (tmp_path / "gym.jsonl").write_text(json.dumps(ROW) + "\n")
    with resource_server() as (url, asked):
        taskset = {"id": "nemo_gym", "dataset": str(tmp_path / "gym.jsonl"), "task": {"resources_url": url}}
        config = configured(tmp_path, model, taskset, "agent")
        call = '<tool_call>\n{"name": "double", "arguments": {"number": 21}}\n</tool_call>'
        write_tasks(tmp_path)
        [episode] = play(config, [call, "It is 42."])
    assert [path for path, _ in asked] == ["/seed_session", "/double", "/verify"]
    assert episode.score is not None and episode.answer == "It is 42."
    assert (episode.score.value, episode.score.facts) == (1.0, {"nemo_gym": 1.0, "items": 3.0})
    assert '<tool_response>\n{"doubled": 42}\n</tool_response>' in text_of(episode)


def test_agents_of_an_episode_share_its_reward(tmp_path: Path, model: Path) -> None:
    (tmp_path / "gym.jsonl").write_text(json.dumps(ROW) + "\n")
    with resource_server() as (url, _):
        taskset = {"id": "nemo_gym", "dataset": str(tmp_path / "gym.jsonl"), "task": {"resources_url": url}}
        config = configured(tmp_path, model, taskset, "agent", env={"id": "best-of-n", "n": 2})
        write_tasks(tmp_path)
        (both, agreed), (_, differ) = attempt(config, ["It is 42.", "42"], ["It is 42.", "It is 41."])
    assert agreed.score.value == 1.0 and agreed.score.facts["pass_at_n"] == 1.0
    assert [sequence.token_ids.tolist() for sequence in agreed.sequences] == [
        [*asked, *sampled] for asked, sampled in zip(both.asked, both.sampled, strict=True)
    ]
    assert "earned different rewards (agent 1, agent 0)" in str(differ)


def test_what_verifiers_refuses_is_told_before_the_run(tmp_path: Path, model: Path) -> None:
    config = configured(tmp_path, model, HANGMAN, "player")
    options = config.environment.options
    taskset = {"id": "textarena", "game": "Chess"}
    wrong = {**options, "env": {**options["env"], "taskset": taskset}}
    environment = config.environment.model_copy(update={"options": wrong})
    with pytest.raises(RapoError, match=r"(?s)environment.options.env = .* cannot be loaded.*Hangman-v0"):
        open_environment(config.model_copy(update={"environment": environment}))


def test_a_run_trains_on_exactly_what_was_sampled(tmp_path: Path, model: Path) -> None:
    configured(tmp_path, model, HANGMAN, "player")
    write_tasks(tmp_path)
    done = run(tmp_path / "run.toml")
    assert done.process.returncode == 0, done.stderr
    assert not done.left_processes()
    trained = [step for step in metrics(tmp_path / "run") if step["step"]]
    assert len(trained) == 2
    for step in trained:
        assert step["reward/unknown"] == 0
        assert step["environment/turns"] == 2, "TextArena ends a game at the second move that is none"
        assert step["environment/refused"] == 0 and step["environment/sequences"] == 1
        assert step["mismatch/log_prob_mean"] < 1e-5, "the trainer finds the log-probs that passed"
        assert step["reward/game_reward"] == step["reward/mean"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [EMBEDDED, SGLANG_CPU, VLLM_CPU])
def test_a_game_on_a_server_that_is_not_ours_is_recorded_exactly(
    tmp_path: Path, model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probs are those of transformers, given the tokens of all turns before."""
    if reason := why_not(kind):
        pytest.skip(reason)
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    config = configured(tmp_path, model, HANGMAN, "player")
    write_tasks(tmp_path)
    row = json.loads((tmp_path / "tasks.jsonl").read_text().splitlines()[0])
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    size = reference.config.vocab_size
    clients: dict[str, Connect] = {EMBEDDED: EmbeddedClient, SGLANG_CPU: SGLangClient, VLLM_CPU: VLLMClient}
    with (
        running(kind, model, tmp_path / "engine.log", "--dtype=float32") as url,
        EnginePool([url], clients[kind], vocab_size=size, prompts_per_request=1, request_timeout=120) as pool,
    ):
        pool.update_weights(model, 1)
        episodes = EpisodeRunner(open_environment(config), config.environment, byte_level(), 1.0, size)
        with Runner(episodes, pool) as runner:
            sampling = Sampling(4, 1900, temperature=1.0, weight_version=1, seed=3)
            [group] = runner.run([Prompt(0, "?", (1, 2), "", columns=row)], sampling, never)
    assert group is not None
    for one in group.episodes:
        assert one.reward is not None, one.verification
        [sequence] = one.episode.sequences
        sampled = sequence.sampled[1:]
        assert np.count_nonzero(np.diff(sequence.sampled.astype(int)) == 1) == 2, "two turns, and one between"
        tokens = torch.from_numpy(sequence.token_ids).long()
        with torch.inference_mode():
            told = reference(tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
        np.testing.assert_allclose(sequence.log_probs[1:][sampled], told.numpy()[sampled], atol=1e-4)


async def never(answer: str, problem: Problem) -> Verification:
    raise AssertionError("verifiers rewards itself")
