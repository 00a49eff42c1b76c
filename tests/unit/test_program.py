"""Programs that are not ours play episodes, through the gateway and an interpreter of their own."""

from __future__ import annotations

import asyncio
import inspect
import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import AutoConfig

from megatron_rapo.agents import process as agent_process
from megatron_rapo.agents.foreign import worker
from megatron_rapo.agents.process import AgentProcess
from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.program import Program
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.environments.verifiers import Verifiers, write_tasks
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.gateway.route import Ending
from megatron_rapo.processes import keeper
from megatron_rapo.record.answers import AnswerLog
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling, sample_seed
from tests.leftovers import nothing_left
from tests.models import SHAPE, make_tokenizer
from tests.stand_in import VOCAB, StandIn, stand_ins

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs/gateway.md"
PROMPTS = [
    Prompt(number, "?", (number + 1, 7), "gold", draw=number, columns={"level": number, "token": 7})
    for number in range(3)
]
SAMPLING = Sampling(2, 20, temperature=1.0, weight_version=3, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a program is told of a policy: no weights."""
    folder = tmp_path_factory.mktemp("model") / "policy"
    AutoConfig.for_model("qwen2", **SHAPE).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def config(model: Path, program: str, **environment: Any) -> RunConfig:
    options = {"program": f"agents:{program}", **environment.pop("options", {})}
    code = environment.pop("code", [str(TESTS)])
    return validate(
        {
            "run": {"directory": str(model / "run"), "steps": 1, "code": code},
            "model": {"path": str(model)},
            "data": {"source": "arithmetic"},
            "rollout": {"prompts_per_step": 4, "max_response_tokens": 20},
            "environment": {"use": "program", "options": options, **environment},
        },
        source="test",
    )


class Played:
    """Episodes of a program, with a stand-in for an engine."""

    def __init__(self, model: Path, stand_in: StandIn, pool: EnginePool) -> None:
        self.model, self.stand_in, self.pool = model, stand_in, pool

    def __call__(
        self, program: str, answers: Answers | None = None, **environment: Any
    ) -> list[ScoredEpisode]:
        run = config(self.model, program, **environment)
        episodes = EpisodeRunner(open_environment(run), run.environment, make_tokenizer(), 1.0, VOCAB)
        with (
            Runner(episodes, self.pool) as runner,
            runner.begin(PROMPTS, SAMPLING, judge, answers=answers) as rollout,
        ):
            groups = rollout.groups()
        return [one for group in groups if group for one in group.episodes]


async def judge(answer: str, problem: Problem) -> Verification:
    return Verification(Outcome.CORRECT if answer == str(problem.token_ids[0]) else Outcome.WRONG)


@pytest.fixture
def played(model: Path) -> Iterator[Played]:
    with (
        nothing_left(),
        stand_ins(1) as ([stand_in], urls),
        EnginePool(urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=4, request_timeout=60) as pool,
    ):
        yield Played(model, stand_in, pool)


def test_what_passes_the_gateway_is_trained_on(played: Played) -> None:
    episodes = played(
        "turns", options={"arguments": {"count": 3, "given": 11}, "processes": 2, "python": sys.executable}
    )
    assert len(episodes) == 6
    for place, one in enumerate(episodes):
        prompt, number = PROMPTS[place // 2], place % 2
        [sequence] = one.episode.sequences
        expected, mask = list(prompt.token_ids), [False] * 2
        for turn in range(3):
            given = [11] * bool(turn)
            # A stand-in samples the first token of the prompt, and one that tells the seed.
            sampled = [prompt.token_ids[0], sample_seed(5, prompt, number, turn) % VOCAB]
            expected, mask = [*expected, *given, *sampled], [*mask, *[False] * len(given), True, True]
        assert sequence.token_ids.tolist() == expected
        assert sequence.sampled.tolist() == mask
        assert sequence.log_probs[sequence.sampled].tolist() == [-0.25, -0.5] * 3
        assert set(sequence.versions[sequence.sampled].tolist()) == {3}
        assert one.reward == 0.25 and one.episode.answer == "what it says"
        assert one.verification.facts == {"tokens": 10, "level": place // 2}
        facts = {"turns": 3, "refused": 0, "sequences": 1}
        ended = {"ended_answered": 1, "ended_out_of_turns": 0, "ended_out_of_tokens": 0}
        assert one.episode.facts == {**facts, **ended} and not one.episode.truncated
    asked = [body for path, body in played.stand_in.asked if path == "/generate"]
    assert max(len(body["input_ids"]) for body in asked) == 6, "first turns go out together"


def test_a_step_that_is_done_again_has_the_tokens_of_before(played: Played) -> None:
    """What programs hear is never the same twice; here they have it kept."""
    (played.model / "run").mkdir()

    def tokens(answers: AnswerLog | None = None) -> list[list[int]]:
        episodes = played("searches", answers=answers.of_step(1) if answers else None)
        return [one.episode.sequences[0].token_ids.tolist() for one in episodes]

    with closing(AnswerLog(config(played.model, "searches"), 0)) as log:
        first = tokens(log)
    with closing(AnswerLog(config(played.model, "searches"), 0)) as log:
        assert tokens(log) == first
    assert len({tuple(one[4:7]) for one in first}) == 6 and tokens() != first


def test_the_page_s_program_plays(played: Played, tmp_path: Path) -> None:
    [source] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_agent.py").write_text(source)
    options = {"program": "my_agent:play", "processes": 1}
    episodes = played("", code=[str(tmp_path)], options=options)
    expected = [
        [prompt.token_ids[0], sample_seed(5, prompt, n) % VOCAB] for prompt in PROMPTS for n in (0, 1)
    ]
    assert [one.reward for one in episodes] == [float(7 in said) for said in expected]
    assert {one.verification.facts["said"] for one in episodes} == {2}


def test_the_page_has_every_option_and_ending() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in [*Program.Options.model_fields, *Verifiers.Options.model_fields]:
        assert re.search(rf"^\| `{name}` \|", text, re.M), name
    for ending in Ending:
        assert f"`{ending}`" in text
    for name, one in inspect.signature(worker.Episode).parameters.items():
        assert f"`{name}`" in text, one


def test_the_configured_reward_judges_a_text(played: Played) -> None:
    assert [one.verification.outcome for one in played("text")] == [Outcome.CORRECT] * 6


@pytest.mark.parametrize(
    ("limits", "ending", "refusal"),
    [
        ({"max_turns": 4}, "out_of_turns", "the episode has had its environment.max_turns = 4 turns"),
        ({"max_turns": 99}, "out_of_tokens", "This model's maximum context length is 22 tokens"),
    ],
)
def test_a_program_that_never_ends_is_told_its_limits(
    played: Played, limits: dict[str, Any], ending: str, refusal: str
) -> None:
    for one in played("greedy", **limits):
        assert one.episode.answer.startswith(refusal)
        assert one.episode.facts[f"ended_{ending}"] == one.episode.facts["refused"] == 1
        assert one.reward == 1.0 and one.episode.truncated
        assert one.episode.facts["turns"] == min(limits["max_turns"], 10)


FAULTS = {
    "raises": "agents:raises raised LookupError: no such move",
    "returns_nothing": "the program returned None; return a reward, a text",
    "dies": "agents:dies: its process ended with status 7",
    "asks_nothing": "the program asked for 0 turns, none of which is trained on",
    "other_sessions": r"sessions of the episode: [''], of the answer: ['x']",
}


def test_a_connection_that_is_reset_is_the_end_of_the_process_like_any_other() -> None:
    """So it is where the process ends before it has read all that it was told."""

    async def read() -> BaseException | None:
        process = AgentProcess.__new__(AgentProcess)
        process._plan = SimpleNamespace(address="agents:dies")  # type: ignore[assignment]
        process._keeper = SimpleNamespace(stdin=io.BytesIO(), wait=lambda: 7)  # type: ignore[assignment]
        answer = asyncio.get_running_loop().create_future()
        process._waiting, process._given_up = {0: answer}, {}
        reader = asyncio.StreamReader()
        reader.set_exception(ConnectionResetError(104, "Connection reset by peer"))
        await process._read(reader)
        return answer.exception()

    assert FAULTS["dies"] in str(asyncio.run(read()))


@pytest.mark.parametrize("program", FAULTS)
def test_a_program_at_fault_leaves_the_reward_unknown_and_is_told(played: Played, program: str) -> None:
    for one in played(program):
        assert one.verification.outcome is Outcome.CRASH and one.reward is None
        assert FAULTS[program] in (one.verification.why or "")
        if program == "raises":
            assert 'raise LookupError("no such move")' in (one.verification.trace or "")
            assert str(TESTS / "agents.py") in (one.verification.trace or "")


def test_a_reward_that_is_no_number_ends_the_run(played: Played) -> None:
    with pytest.raises(RapoError, match="the reward is 'one'"):
        played("not_a_number")


def test_an_episode_that_hangs_is_given_up_and_holds_back_no_other(played: Played) -> None:
    outcomes = [one.verification.outcome for one in played("hangs", time_limit_s=3)]
    assert outcomes == [Outcome.CORRECT] * 2 + [Outcome.TIMEOUT] * 2 + [Outcome.CORRECT] * 2


def test_a_program_that_blocks_its_process_is_killed(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_process, "CANCEL_LIMIT_S", 0.2)
    assert {one.verification.outcome for one in played("blocks", time_limit_s=2)} == {Outcome.TIMEOUT}


def test_an_agent_keeps_what_it_opened_and_leaves_no_process(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENT_CLOSED", str(tmp_path / "closed"))
    duration = f"{time.time_ns() % 10**6}.5"
    episodes = played("Agent", options={"arguments": {"sleep": duration}})
    assert sorted(one.reward or 0 for one in episodes) == [1, 2, 3, 4, 5, 6], "one object plays all"
    assert (tmp_path / "closed").read_text() == "6"
    assert not [p for p in psutil.process_iter(["cmdline"]) if duration in (p.info["cmdline"] or [])]


def test_verifiers_rewards_itself_and_has_tasks(model: Path, tmp_path: Path) -> None:
    run = config(model, "turns")
    use = run.environment.model_copy(update={"use": "verifiers", "options": {}})
    itself = run.model_copy(update={"environment": use})
    assert run.needs_answers(run.data) and not itself.needs_answers(run.data)
    with pytest.raises(RapoError, match=r'environment.use = "program" has no tasks of its own'):
        write_tasks(run, 1, tmp_path / "tasks.jsonl")
    with pytest.raises(RapoError, match=r"environment.options.env is missing; set it; verifiers has the"):
        write_tasks(itself, 1, tmp_path / "tasks.jsonl")


def test_what_cannot_be_loaded_is_told_before_the_run(model: Path) -> None:
    with pytest.raises(RapoError, match=r'program = "agents.turns" is no address; write "agents:turns"'):
        open_environment(config(model, "", code=[], options={"program": "agents.turns"}))
    with pytest.raises(RapoError, match="'/nowhere/python' is no interpreter"):
        open_environment(config(model, "turns", options={"python": "/nowhere/python"}))
    with nothing_left():
        with pytest.raises(
            RapoError, match=r"(?s)program = \"agents:nothing\" cannot be loaded.*no attribute"
        ):
            open_environment(config(model, "nothing"))
        with pytest.raises(RapoError, match=r"(?s)cannot be loaded.*unexpected keyword argument 'other'"):
            open_environment(config(model, "Agent", options={"arguments": {"other": 1}}))
        with pytest.raises(RapoError, match=r"false did not start it \(status 1"):
            open_environment(config(model, "turns", options={"python": "/bin/false"}))


def test_all_that_a_command_started_ends_with_who_started_it() -> None:
    script = "import subprocess, time; subprocess.Popen(['setsid', '-f', 'sleep', '987.5']); time.sleep(900)"
    owner = (
        "import subprocess, sys, time\n"
        f"command = [{keeper.__file__!r}, '2', '0.2', sys.executable, '-c', {script!r}]\n"
        "subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE)\n"
        "time.sleep(900)"
    )
    with subprocess.Popen([sys.executable, "-c", owner]) as process:
        ours = lambda: [p for p in psutil.process_iter(["cmdline"]) if "987.5" in str(p.info["cmdline"])]  # noqa: E731
        deadline = time.monotonic() + 20
        while len(ours()) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(ours()) >= 3
        process.send_signal(signal.SIGKILL)
    while ours() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not ours()
