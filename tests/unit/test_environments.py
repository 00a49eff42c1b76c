"""Environments: what they are given, what is trained on of it, and what they must not do."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.config.load import validate
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.environments.times import Times
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling, sample_seed
from tests.stand_in import VOCAB, StandIn, stand_ins

PAGE = Path(__file__).parents[2] / "docs/environments.md"
PROMPTS = [Prompt(number, "?", (number + 1, 7), str(number), draw=number) for number in range(3)]
SAMPLING = Sampling(2, 8, temperature=1.0, weight_version=3, seed=5)
GIVEN = [40, 41]


def config(tmp_path: Path, **environment: Any) -> RunConfig:
    code = {"code": [str(tmp_path)]} if ":" in environment["use"] else {}
    return validate(
        {
            "run": {"directory": str(tmp_path / "run"), "steps": 1, **code},
            "model": {"path": "model"},
            "data": {"source": "arithmetic"},
            "rollout": {"prompts_per_step": 4, "max_response_tokens": 8},
            "environment": environment,
        },
        source="test",
    )


TOKENIZER: Any = SimpleNamespace(
    decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)),
    encode=lambda text, add_special_tokens: [int(w) if w.isdigit() else 44 for w in text.split()],
)


async def judge(answer: str, problem: Problem) -> Verification:
    """Right where the answer begins with the first token of the prompt."""
    right = answer.split()[0] == str(problem.token_ids[0])
    return Verification(Outcome.CORRECT if right else Outcome.WRONG)


class Sequential(SGLangClient):
    """Of an engine that serves one request at a time."""

    one_request_at_a_time = True


class Engine:
    """A stand-in engine, and the groups that an environment makes of it; times of the newest rollout."""

    times: Times

    def __init__(self, stand_in: StandIn, pool: EnginePool, tmp_path: Path) -> None:
        self.stand_in, self.pool, self.folder = stand_in, pool, tmp_path

    def run(
        self, source: str = "", use: str = "single_turn", limit: int = 8, **options: Any
    ) -> list[Group | None]:
        module = f"environment_{len(list(self.folder.iterdir()))}_{self.folder.name}".replace("-", "_")
        if source:
            (self.folder / f"{module}.py").write_text(source)
            use = f"{module}:{use}"
        run = config(self.folder, use=use, **options)
        episodes = EpisodeRunner(open_environment(run), run.environment, TOKENIZER, 1.0, VOCAB)
        sampling = replace(SAMPLING, max_response_tokens=limit)
        with Runner(episodes, self.pool) as runner, runner.begin(PROMPTS, sampling, judge) as rollout:
            self.times = rollout.times
            return rollout.groups()

    def asked(self) -> list[dict[str, Any]]:
        """Bodies of requests for responses."""
        return generations(self.stand_in)


@pytest.fixture
def kind() -> type[SGLangClient]:
    return SGLangClient


@pytest.fixture
def engine(kind: type[SGLangClient], tmp_path: Path) -> Iterator[Engine]:
    with (
        stand_ins(1) as ([stand_in], urls),
        EnginePool(urls, kind, vocab_size=VOCAB, prompts_per_request=2, request_timeout=60) as pool,
    ):
        yield Engine(stand_in, pool, tmp_path)


def test_single_turn_trains_on_the_response_and_has_it_judged(engine: Engine) -> None:
    groups = engine.run()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert group is not None and group.problem == prompt.problem
        assert group.rewards == [1.0, 1.0]
        for number, one in enumerate(group.episodes):
            [sequence] = one.episode.sequences
            sampled = [prompt.token_ids[0], sample_seed(5, prompt, number) % VOCAB]
            assert sequence.token_ids.tolist() == [*prompt.token_ids, *sampled]
            assert sequence.sampled.tolist() == [False, False, True, True]
            assert sequence.log_probs[2:].tolist() == [-0.25, -0.5]
            assert sequence.versions.tolist() == [-1, -1, 3, 3]
    sizes = sorted(len(body["input_ids"]) for body in engine.asked())
    assert sizes == [2, 4], "whole groups, at most two a request"


TURNS = """
from megatron_rapo import Episode, Score, Transcript

class Turns:
    async def run(self, problem, generate, seed):
        transcript = Transcript(problem.token_ids)
        for number in range(3):
            turn = await generate(transcript.token_ids, turn=number, max_tokens=2, stop=[9])
            transcript.add_turn(turn)
            if number < 2:
                transcript.add_given(generate.encode("40 41"))
        return Episode((transcript.sequence(),), turn.text, Score(0.25, {"turns": 3}))
"""


def generations(server: StandIn) -> list[dict[str, Any]]:
    """Bodies of requests for responses."""
    return [body for path, body in server.asked if path == "/generate"]


def when_all_are_asked(servers: list[StandIn], requests: int) -> None:
    """Lets the servers answer once they have so many requests."""
    for server in servers:
        server.go_on.clear()
    deadline = time.monotonic() + 30
    while sum(map(len, map(generations, servers))) < requests and time.monotonic() < deadline:
        time.sleep(0.01)
    for server in servers:
        server.go_on.set()


def test_later_turns_go_to_the_engine_that_has_their_context(tmp_path: Path) -> None:
    with (
        stand_ins(2) as (servers, urls),
        EnginePool(urls, SGLangClient, vocab_size=VOCAB, prompts_per_request=1, request_timeout=60) as pool,
    ):
        release = threading.Thread(target=when_all_are_asked, args=(servers, len(PROMPTS)))
        release.start()
        Engine(servers[0], pool, tmp_path).run(TURNS, use="Turns", limit=20)
        release.join()
    firsts = []
    for server in servers:
        asked = [ids for body in generations(server) for ids in body["input_ids"]]
        firsts.append({tuple(ids) for ids in asked if len(ids) == 2})
        assert {tuple(ids[:2]) for ids in asked} == firsts[-1]
        assert sorted(map(len, asked)) == [length for length in (2, 6, 10) for _ in range(len(asked) // 3)]
    assert sorted(map(len, firsts)) == [1, 2]


@pytest.mark.parametrize("kind", [SGLangClient, Sequential])
def test_what_is_trained_is_token_for_token_what_was_sampled(
    engine: Engine, kind: type[SGLangClient]
) -> None:
    groups = engine.run(TURNS, "Turns", limit=10)
    sampled_by_prompt: dict[tuple[int, ...], list[int]] = {}
    for body in engine.asked():
        for ids, params in zip(body["input_ids"], body["sampling_params"], strict=True):
            assert (params["max_new_tokens"], params["stop_token_ids"]) == (2, [9])
            sampled_by_prompt[(*ids, params["sampling_seed"])] = [ids[0], params["sampling_seed"] % VOCAB]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert group is not None
        assert group.rewards == [0.25, 0.25]
        assert [one.verification.outcome for one in group.episodes] == [Outcome.WRONG] * 2
        for number, one in enumerate(group.episodes):
            [sequence] = one.episode.sequences
            expected = list(prompt.token_ids)
            mask = [False] * 2
            for turn in range(3):
                seed = sample_seed(5, prompt, number, turn)
                expected += sampled_by_prompt[(*expected, seed)]
                mask += [True, True]
                if turn < 2:
                    expected += GIVEN
                    mask += [False, False]
            assert sequence.token_ids.tolist() == expected
            assert sequence.sampled.tolist() == mask
            assert np.isnan(sequence.log_probs[~sequence.sampled]).all()
    sizes = sorted(len(body["input_ids"]) for body in engine.asked())
    assert sizes == ([2, 2, 2, 4, 4, 4] if kind is Sequential else [1] * 12 + [2, 4])


def test_the_page_s_example_is_an_environment(engine: Engine) -> None:
    source, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    groups = engine.run(source, "GuessAgain", limit=20, options={"tries": 2}, max_turns=2)
    assert all(group is not None and len(group.episodes) == 2 for group in groups)
    [first, *_] = [one for group in groups if group for one in group.episodes]
    assert first.verification.facts["guesses"] in (1, 2)


FAULTS = {
    "the same turn twice": ("await generate(problem.token_ids)\n        " * 2, "called twice with turn = 0"),
    "too many turns": (
        "for turn in range(99): await generate(problem.token_ids, turn=turn)",
        r"more than environment.max_turns = 4 turns",
    ),
    "another working directory": (
        "import os; os.chdir('/usr')\n"
        "        made = Transcript(problem.token_ids); made.add_turn(await generate(made.token_ids))\n"
        "        return Episode((made.sequence(),), '')",
        "the working directory is /usr now, and the run's relative paths begin in /.*; leave it",
    ),
    "no episode": ("return 1", r"run returned 1 \(int\), no Episode"),
    **{
        f"a field of another type: {field}": (
            "made = Transcript(problem.token_ids); made.add_turn(await generate(made.token_ids))\n"
            "        good = Episode((made.sequence(),), '')\n"
            f"        return dataclasses.replace(good, {field})",
            message,
        )
        for field, message in {
            "sequences=made": r"an episode's sequences is <.*Transcript\); let it be a tuple of",
            "sequences=[made]": r"an episode's sequences is <.*Transcript\); let it be what a Transcript's",
            "answer=None": r"an episode's answer is None \(NoneType\); let it be a text",
            "answer=b'5'": r"an episode's answer is b'5' \(bytes\)",
            "score=0.5": r"an episode's score is 0.5 \(float\); let it be a Score, or None",
            "score=Score(1.0, {}, 5)": r"an episode's score.answer is 5 \(int\)",
            "score=Score(1e300)": r"came to the reward 1e\+300, and rewards are from",
            "truncated=None": r"an episode's truncated is None \(NoneType\); let it be True or False",
            "facts=[1]": r"the facts \[1\] \(list\); give a dict",
        }.items()
    },
    "nothing sampled": (
        "return Episode((Transcript([1, 2]).sequence(),), '')",
        "no sampled token; return the sequences",
    ),
    "decoded and encoded again": (
        "turn = await generate(problem.token_ids)\n"
        "        turn.token_ids[0] += 1\n"
        "        other = Turn(turn.token_ids + 1, turn.log_probs, turn.versions, 'stop', '')\n"
        "        made = Transcript(problem.token_ids); made.add_turn(other)\n"
        "        return Episode((made.sequence(),), '')",
        "token 2 of a sequence is marked as sampled, but no engine sampled it there",
    ),
    "another log-prob": (
        "turn = await generate(problem.token_ids)\n"
        "        other = Turn(turn.token_ids, turn.log_probs - 1, turn.versions, 'stop', '')\n"
        "        made = Transcript(problem.token_ids); made.add_turn(other)\n"
        "        return Episode((made.sequence(),), '')",
        "token 2 of a sequence is marked as sampled, but no engine sampled it there",
    ),
    "too long": (
        "made = Transcript(problem.token_ids)\n"
        "        made.add_turn(await generate(made.token_ids)); made.add_given([1] * 9)\n"
        "        return Episode((made.sequence(),), '')",
        "a sequence has 13 tokens, more than the prompt and rollout.max_response_tokens",
    ),
    "a token that the model lacks": (
        "made = Transcript(problem.token_ids)\n"
        "        made.add_turn(await generate(made.token_ids)); made.add_given([50])\n"
        "        return Episode((made.sequence(),), '')",
        "a sequence has token id 50, and the model has 50 tokens; give what generate.encode makes",
    ),
    "a fact by another metric's name": (
        "made = Transcript(problem.token_ids); made.add_turn(await generate(made.token_ids))\n"
        "        return Episode((made.sequence(),), '', Score(1.0, {'mean': 5.0}))",
        "fact by the name 'mean', which cannot be logged as reward/mean; that is another metric",
    ),
    "a fact that is no number": (
        "made = Transcript(problem.token_ids); made.add_turn(await generate(made.token_ids))\n"
        "        return Episode((made.sequence(),), '', facts={'pages': 'two'})",
        r"the fact 'pages' = 'two' \(str\); give a finite number",
    ),
    "facts that are none": (
        "made = Transcript(problem.token_ids); made.add_turn(await generate(made.token_ids))\n"
        "        return Episode((made.sequence(),), '', Score(1.0, None))",
        r"the facts None \(NoneType\); give a dict of numbers by name",
    ),
    "no number": (
        "made = Transcript(problem.token_ids); made.add_turn(await generate(made.token_ids))\n"
        "        return Episode((made.sequence(),), '', Score(float('nan')))",
        r"the reward is nan \(float\), no finite number",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_what_the_protocol_does_not_allow_ends_the_run_and_is_named(
    engine: Engine, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(engine.folder)  # and back afterwards
    body, message = FAULTS[what]
    source = (
        "import dataclasses\nfrom megatron_rapo import Episode, Score, Transcript, Turn\n"
        f"class Bad:\n    async def run(self, problem, generate, seed):\n        {body}\n"
    )
    with pytest.raises(RapoError, match=message) as refused:
        engine.run(source, "Bad", max_turns=4)
    assert "environment.use" in str(refused.value)


def test_episodes_that_raise_or_take_too_long_are_unknown_and_harm_no_other(engine: Engine) -> None:
    source = """
import asyncio
from megatron_rapo import Episode, Transcript

class Some:
    async def run(self, problem, generate, seed):
        transcript = Transcript(problem.token_ids)
        if problem.id == "1":
            raise KeyError("no such page")
        if problem.id == "2":
            await asyncio.sleep(60)
        transcript.add_turn(await generate(transcript.token_ids))
        return Episode((transcript.sequence(),), "1")
"""
    began = time.monotonic()
    groups = engine.run(source, "Some", time_limit_s=0.5)
    assert time.monotonic() - began < 30
    found = [[one.verification.outcome for one in group.episodes] for group in groups if group]
    assert found == [[Outcome.CORRECT] * 2, [Outcome.CRASH] * 2, [Outcome.TIMEOUT] * 2]
    crash, late = groups[1], groups[2]
    assert crash is not None and late is not None
    assert crash.rewards == late.rewards == [None, None]
    assert crash.episodes[0].verification.why == "KeyError: 'no such page'"
    assert 'raise KeyError("no such page")' in (crash.episodes[0].verification.trace or "")
    assert "environment.time_limit_s = 0.5" in (late.episodes[0].verification.why or "")


def test_numpy_s_kinds_and_odd_texts_of_an_episode_are_taken(engine: Engine) -> None:
    source = """
import numpy as np
from megatron_rapo import Episode, Score, Transcript

class Loud(Exception):
    def __str__(self):
        raise RuntimeError("no message")

class Odd:
    async def run(self, problem, generate, seed):
        if problem.id == "1":
            raise Loud
        made = Transcript(problem.token_ids)
        made.add_turn(await generate(made.token_ids))
        return Episode([made.sequence()], "a\\ud800", Score(np.float32(0.5)), truncated=np.bool_(True))
"""
    first, loud, _ = engine.run(source, "Odd")
    assert first is not None and loud is not None
    for one in first.episodes:
        assert isinstance(one.episode, Episode)
        assert (one.episode.answer, one.episode.truncated, one.reward) == ("a?", True, 0.5)
    assert loud.episodes[0].verification.why == "Loud, whose message fails"


def test_time_at_engines_is_not_an_episode_s_own(engine: Engine) -> None:
    engine.stand_in.change = lambda answers: time.sleep(0.6) or answers
    groups = engine.run(TURNS, "Turns", limit=10, time_limit_s=0.5)
    assert all(group is not None and group.rewards == [0.25, 0.25] for group in groups)


@pytest.mark.parametrize("kind", [SGLangClient, Sequential])
def test_time_is_told_apart_by_where_it_goes(engine: Engine, kind: type[SGLangClient]) -> None:
    """Three turns of 0.2 s at the engine, and 0.4 s between two of them in the environment."""
    engine.stand_in.change = lambda answers: time.sleep(0.2) or answers
    slow = TURNS.replace("if number < 2:", "if number < 2:\n                await asyncio.sleep(0.4)")
    engine.run(f"import asyncio\n{slow}", "Turns", limit=10)
    assert engine.times.episodes == 6
    told, slack = engine.times.metrics(), 0.6  # of a busy machine
    at_engine, own = told["time/episode/engine_s"], told["time/episode/own_s"]
    assert 0.6 <= at_engine < 0.6 + slack
    assert 0.8 <= own < 0.8 + slack
    assert told["time/engines_idle"] == pytest.approx(own / (own + at_engine), abs=0.15)


def test_a_slow_episode_holds_back_no_other(engine: Engine) -> None:
    slow = TURNS.replace("if number < 2:", 'if number < 2:\n                await sleep(problem.id == "1")')
    engine.run(f"from asyncio import sleep\n{slow}", "Turns", limit=10)
    firsts = [body["input_ids"][0][0] for body in engine.asked() if len(body["input_ids"]) == 1]
    assert sorted(firsts[:8]) == [1] * 4 + [3] * 4, "both later turns of all others"
    assert firsts[8:] == [2] * 4
    assert engine.times.metrics()["time/engines_idle"] > 0.5  # of more than a second


def test_an_environment_that_blocks_all_episodes_is_named_with_its_line(engine: Engine) -> None:
    source = """
import time

class Blocks:
    async def run(self, problem, generate, seed):
        time.sleep(8)
"""
    with pytest.raises(RapoError, match=r"has blocked all episodes for more than .*= 0\.4 s") as refused:
        engine.run(source, "Blocks", time_limit_s=0.4)
    assert "time.sleep(8)" in str(refused.value)


def test_a_turn_gets_what_is_left_of_the_limit_and_nothing_beyond_it(engine: Engine) -> None:
    source = """
from megatron_rapo import Episode, Score, Transcript

class Long:
    async def run(self, problem, generate, seed):
        transcript = Transcript(problem.token_ids)
        transcript.add_turn(await generate(transcript.token_ids))
        transcript.add_given([3, 3])
        transcript.add_turn(await generate(transcript.token_ids, turn=1, max_tokens=99))
        transcript.add_given([3, 3])
        last = await generate(transcript.token_ids, turn=2)
        return Episode((transcript.sequence(),), last.text, Score(float(last.truncated)), last.truncated)
"""
    groups = engine.run(source, "Long")
    assert all(group is not None and group.rewards == [1.0, 1.0] for group in groups)
    limits = [params["max_new_tokens"] for body in engine.asked() for params in body["sampling_params"]]
    assert sorted(set(limits)) == [4, 8], "8 at first; 4 after two sampled and two given ones; then none"


@pytest.mark.parametrize(
    ("source", "use", "options", "message"),
    [
        ("", "search", {}, r'environment.use = "search" is no environment; choose one of single_turn'),
        (
            "class A:\n    pass\n",
            "A",
            {},
            r"is no class with `async def run\(self, problem, generate, seed\)`",
        ),
        (
            "class A:\n    def run(self, problem, generate, seed): ...\n",
            "A",
            {},
            "is no class with `async def",
        ),
        (
            "class A:\n    async def run(self, generate, problem, seed): ...\n",
            "A",
            {},
            r"A.run\" \(.*.py:2\) takes .*: its parameter generate stands where problem is given",
        ),
        ("class A:\n    async def run(self, problem, generate): ...\n", "A", {}, "too many positional arg"),
        (
            "class A:\n    async def run(self, problem, generate, seed): ...\n",
            "A",
            {"depth": 2},
            r"environment.options does not fit .*depth.*: see ".replace(": see ", ".*see "),
        ),
        (
            "from megatron_rapo import Section\n"
            "class A:\n    class Options(Section):\n        depth: int = 1\n"
            "    def __init__(self, options): ...\n"
            "    async def run(self, problem, generate, seed): ...\n",
            "A",
            {"depth": "two"},
            r'environment.options.depth = "two": .*integer.*has the options depth',
        ),
    ],
)
def test_what_is_no_environment_is_refused(
    engine: Engine, source: str, use: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RapoError, match=message):
        engine.run(source, use, options=options)
    assert not engine.asked()


def test_options_of_the_default_environment_would_have_no_effect() -> None:
    assert EnvironmentOptions(use="guess:GuessAgain", options={"tries": 2}, max_turns=2).options == {
        "tries": 2
    }
    for option in ({"options": {"tries": 2}}, {"max_turns": 2}, {"time_limit_s": 9.0}):
        with pytest.raises(ValueError, match=r'would have no effect: use is "single_turn"'):
            EnvironmentOptions(**option)  # type: ignore[arg-type]


@pytest.mark.parametrize(("limit", "within"), [(3, True), (2, False)])
def test_an_episode_has_as_many_turns_as_the_limit_says(engine: Engine, limit: int, within: bool) -> None:
    if within:
        assert all(group is not None for group in engine.run(TURNS, "Turns", limit=10, max_turns=limit))
        return
    with pytest.raises(RapoError, match=r"more than environment.max_turns = 2 turns"):
        engine.run(TURNS, "Turns", limit=10, max_turns=limit)


def test_an_environment_that_cannot_go_on_ends_the_run_and_is_closed(engine: Engine, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    source = f"""
from pathlib import Path

from megatron_rapo.errors import RapoError

class Hopeless:
    async def run(self, problem, generate, seed):
        await generate(problem.token_ids)
        raise RapoError("no tool can be started; mend them")

    async def aclose(self):
        Path({str(closed)!r}).touch()
"""
    with pytest.raises(RapoError, match="no tool can be started"):
        engine.run(source, "Hopeless")
    assert closed.exists()
