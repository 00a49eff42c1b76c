"""Rewards of a user's own: what counts, what is refused, and what is unknown, in the processes that judge."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rapo.config import Reward, RewardFunction, RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.config.reward import TAKEN
from megatron_rapo.config.verifiers import RewardPlan, built_in
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.reward.functions import Functions
from megatron_rapo.reward.verifier import Verifier

CORRECT, WRONG, TIMEOUT, CRASH = Outcome
PROBLEM = Problem("p7", "3 4=7:", "seven", "countdown", (1, 2), {"target": 7, "numbers": [3, 4]})

REWARDS = """
import asyncio, enum, functools, os, subprocess, sys, time
from fractions import Fraction
import numpy as np
from megatron_rapo.episode.score import Score

def score(response, problem):
    return eval(response)

async def later(response, problem):
    global loop
    before, loop = globals().get("loop"), asyncio.get_running_loop()
    await asyncio.sleep(0.01)
    return float(before in (None, loop)) * 0.25

def fails(response, problem):
    def deep():
        raise KeyError("unlucky")
    deep()

def exits(response, problem):
    sys.exit(3)

def hangs(response, problem):
    subprocess.Popen(["sleep", "3271"])
    while True:
        pass

def hogs(response, problem):
    if response == "hog":
        return sum(bytearray(6 * 2**30))
    return 1.0

def thirds(response, problem):
    if int(response) % 3 == 0:
        raise ValueError(response)
    return 0.5

def facts(response, problem):
    return Score(0.5, {"length": len(response), "even": len(response) % 2 == 0}, answer=response)

def times(response, problem, *, factor):
    return factor * len(response)

class Named(enum.StrEnum):
    LENGTH = "length"

class Odd(float):
    def __float__(self):
        raise ValueError("odd")
    def __repr__(self):
        raise ValueError("odd")

def forks(response, problem):
    os.fork()
    return float(response)

def swapped(problem, response):
    return problem["target"] + len(response)

def by_name(*, problem, response, offset=0):
    return problem["target"] + len(response) + offset

def by_any_name(**given):
    return given["problem"]["target"] + len(given["response"])

def of_two_kinds(response, *, problem):
    return problem["target"] + len(response)

def by_place(*given):
    return given[1]["target"] + len(given[0])

def two(text, columns, /, scale=1):
    return columns["target"] + len(text)

class Judge:
    async def __call__(self, problem, response):
        return problem["target"] + len(response)

judge = Judge()
part = functools.partial(by_name, offset=0)

def decorated():
    @functools.wraps(swapped)
    def wrapper(*arguments, **named):
        return swapped(*arguments, **named)
    return wrapper

wrapped = decorated()

def prints(response, problem):
    print("from the function")
    return 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


def plan_of(folder: Path, *uses: str | RewardFunction, **options: Any) -> RewardPlan:
    """Of one function of my_rewards, or of several."""
    if len(uses) == 1 and isinstance(uses[0], str):
        reward = Reward(function=f"my_rewards:{uses[0]}", **options)
    else:
        reward = Reward(functions=[use for use in uses if isinstance(use, RewardFunction)], **options)
    return RewardPlan(reward.parts(), reward.correct_at, (folder,))


def opened(plan: RewardPlan, workers: int = 1, time_limit_s: float = 20.0, **limits: float) -> Verifier:
    return Verifier(plan, workers=workers, time_limit_s=time_limit_s, **limits)


@pytest.fixture(scope="module")
def verify(folder: Path) -> Iterator[Callable[[str], Verification]]:
    """What `score` makes of a response, which it evaluates, in this process."""
    path = list(sys.path)
    part = asdict(plan_of(folder, "score").parts[0])
    functions = Functions([part], 1.0, [str(folder)], TAKEN)
    yield lambda response: functions.verify(response, PROBLEM)
    sys.path[:] = path
    del sys.modules["my_rewards"]


NUMBERS = {
    "0.25": 0.25,
    "-3": -3.0,
    "True": 1.0,
    "False": 0.0,
    "np.float32(0.5)": 0.5,
    "np.int64(2)": 2.0,
    "np.bool_(True)": 1.0,
    "Fraction(1, 4)": 0.25,
    "Score(0.75)": 0.75,
    "Score(True)": 1.0,
    "problem['target'] + len(problem)": 9.0,
    "float(problem.answer == 'seven' and problem.id == 'p7' and problem.question == '3 4=7:')": 1.0,
}


def test_every_kind_of_number_is_a_reward_and_columns_are_seen(verify: Callable[[str], Verification]) -> None:
    found = {text: verify(text) for text in NUMBERS}
    assert {text: one.reward for text, one in found.items()} == NUMBERS
    for text, one in found.items():
        assert one.outcome is (CORRECT if NUMBERS[text] >= 1 else WRONG)
        assert (one.facts, one.why, one.trace) == ({}, None, None)


def test_unknown_can_be_said(verify: Callable[[str], Verification]) -> None:
    found = verify("Score(None)")
    assert (found.outcome, found.reward) == (CRASH, None)
    assert found.why is not None
    assert re.search(
        r'reward.function = "my_rewards:score" \(.*my_rewards.py:7\) returned Score\(None\)', found.why
    )


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        ("float('nan')", r"nan \(float\).*return a finite number, or Score\(None\)"),
        ("-float('inf')", r"-inf \(float\).*return a finite number"),
        ("10 ** 400", r"1000.*\(int\).*return a finite number"),
        ("10 ** 5000", r"a value that cannot be shown \(int\).*return a finite number"),
        ("Score(10 ** 5000)", r"Score\(value\) of a value that cannot be shown \(int\)"),
        ("Odd(1)", r"\(Odd\) for problem p7, which is no reward; return a finite number"),
        ("'0.5'", r"'0.5' \(str\).*return a number \(float\(…\)"),
        ("None", r"None \(NoneType\).*return a number at its every end"),
        ("np.array(1.0)", r"array\(1.\) \(ndarray\).*return a number \(float\(…\)"),
        ("np.ones(3)", r"\(ndarray\).*return a number"),
        ("1j", r"1j \(complex\).*return a number"),
        ("[1.0]", r"\[1.0\] \(list\)"),
        ("{'score': 1.0}", r"\(dict\)"),
        ("Score('x')", r"Score\(value\) of 'x' \(str\)"),
        ("Score(1, [2])", "give a dict of numbers by name"),
        ("Score(1, answer=3)", "answer must be text or None"),
        ("Score(1, {'a': 'b'})", r"the fact 'a' = 'b' \(str\); give a finite number, or leave it"),
        ("Score(1, {'a': float('nan')})", "the fact 'a' = nan"),
        ("Score(1, {'a b': 1})", "a fact by the name 'a b', which cannot be logged as reward/a b; give it"),
        ("Score(1, {3: 1})", r"a fact by the name 3 \(int\); let names be texts"),
        ("Score(1, {Odd(): 1})", r"\(Odd\); let names be texts"),
        ("Score(1, {'a': 10 ** 5000})", r"the fact 'a' = a value that cannot be shown \(int\)"),
        ("Score(1, {'mean': 1})", "cannot be logged as reward/mean; that is another metric: give it another"),
    ],
)
def test_what_is_no_reward_is_refused_with_function_file_and_line(
    verify: Callable[[str], Verification], folder: Path, returned: str, shown: str
) -> None:
    with pytest.raises(RapoError) as caught:
        verify(returned)
    told = rf'reward.function = "my_rewards:score" \({folder}/my_rewards.py:7\) returned .*{shown}'
    assert re.match(told, str(caught.value)), str(caught.value)


def test_a_reward_that_others_cannot_be_compared_with_is_refused(
    verify: Callable[[str], Verification], folder: Path
) -> None:
    for returned in ("1.7e308", "-1e31", "Score(10 ** 100)"):
        with pytest.raises(RapoError, match=r"my_rewards.py:7\) came to the reward .*e\+.*; scale it"):
            verify(returned)
    assert verify("-1e30").reward == -1e30
    functions = [RewardFunction(use="my_rewards:score", weight=1e30, name=name) for name in "ab"]
    with opened(plan_of(folder, *functions)) as verifier, pytest.raises(RapoError, match="scale it"):
        verifier.verify([("10 ** 10", PROBLEM)])


@pytest.mark.parametrize(
    "use",
    ["swapped", "by_name", "by_any_name", "of_two_kinds", "by_place", "two", "judge", "part", "wrapped"],
)
def test_arguments_go_to_the_parameters_of_their_names(folder: Path, use: str) -> None:
    part = asdict(plan_of(folder, use).parts[0])
    found = Functions([part], 1.0, [str(folder)], TAKEN).verify("four", PROBLEM)
    assert (found.reward, found.why) == (11.0, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def score(problem, text): ...", "its parameter problem stands where response is given; give it"),
        ("def score(prompt, response): ...", "its parameter response stands where problem is given"),
        ("def score(problem, response, /): ...", "its parameter problem stands where response is given"),
        ("def score(prompts, completions): ...", "has the parameter prompts where response is given: the re"),
        ("def score(response, answer): ...", "has the parameter answer where problem is given: a mapping of"),
        ("def score(data_source, solution_str, ground_truth): ...", "required argument: 'ground_truth'"),
        ("class score:\n def __call__(self, response, problem): ...", r"write judge = score\(\) in its modu"),
    ],
)
def test_arguments_that_would_be_exchanged_are_refused(tmp_path: Path, source: str, message: str) -> None:
    module = f"exchanged_{abs(hash(source))}"
    (tmp_path / f"{module}.py").write_text(source)
    plan = RewardPlan(Reward(function=f"{module}:score").parts(), 1.0, (tmp_path,))
    with pytest.raises(RapoError, match=rf"{module}.py:1\) .*{message}"):
        Functions([asdict(plan.parts[0])], 1.0, [str(tmp_path)], TAKEN)


def test_a_copy_that_a_function_forks_answers_nothing(folder: Path) -> None:
    """It would answer for the response before: each would get another one's reward."""
    with opened(plan_of(folder, "forks")) as verifier:
        found = verifier.verify([(str(number), PROBLEM) for number in range(8)])
    assert [one.reward for one in found] == list(range(8))


def test_texts_and_names_of_the_users_own_kind_reach_the_trainer_as_plain_ones(folder: Path) -> None:
    """The trainer has not imported the module; files of samples are UTF-8."""
    with opened(plan_of(folder, "score")) as verifier:
        found, raised = verifier.verify(
            [(r"Score(1, {Named.LENGTH: 3}, answer='x\ud800')", PROBLEM), (r"1 + '\ud800'", PROBLEM)]
        )
    assert ({type(name): name for name in found.facts}, found.extracted) == ({str: "length"}, "x?")
    for text in (raised.why, raised.trace):
        assert text is not None
        text.encode()


def test_what_is_no_reward_ends_what_asked(folder: Path) -> None:
    with opened(plan_of(folder, "score")) as verifier:
        with pytest.raises(RapoError, match="returned nan"):
            verifier.verify([("1.0", PROBLEM), ("float('nan')", PROBLEM), ("1.0", PROBLEM)])
        with pytest.raises(RuntimeError, match="closed"):
            verifier.verify([("1.0", PROBLEM)])


def test_async_functions_share_a_loop(folder: Path) -> None:
    with opened(plan_of(folder, "later")) as verifier:
        assert [one.reward for one in verifier.verify([("", PROBLEM)] * 3)] == [0.25] * 3


def test_exceptions_are_unknown_with_the_users_own_traceback(folder: Path) -> None:
    with opened(plan_of(folder, "fails")) as verifier:
        [found] = verifier.verify([("x", PROBLEM)])
    assert (found.outcome, found.reward, found.why) == (CRASH, None, "KeyError: 'unlucky'")
    assert found.trace is not None
    frames = re.findall(r'File "(.*)", line \d+, in (\w+)', found.trace)
    assert frames == [(f"{folder}/my_rewards.py", name) for name in ("fails", "deep")]


def test_sys_exit_is_unknown_and_costs_no_process(folder: Path) -> None:
    with opened(plan_of(folder, "exits")) as verifier:
        before = psutil.Process().children()
        found = verifier.verify([("x", PROBLEM)] * 2)
        assert psutil.Process().children() == before
    assert [(one.outcome, one.why) for one in found] == [(CRASH, "SystemExit: 3")] * 2


def test_exceptions_in_a_third_of_responses_are_counted(folder: Path) -> None:
    with opened(plan_of(folder, "thirds"), workers=2) as verifier:
        found = verifier.verify([(str(n), PROBLEM) for n in range(30)])
    assert [one.reward for one in found] == [None if n % 3 == 0 else 0.5 for n in range(30)]
    assert [one.why for one in found[::3]] == [f"ValueError: {n}" for n in range(0, 30, 3)]


def test_an_infinite_loop_costs_its_limit_and_ends_with_what_it_started(folder: Path) -> None:
    with opened(plan_of(folder, "hangs"), time_limit_s=1.0) as verifier:
        [found] = verifier.verify([("x", PROBLEM)])
        assert (found.outcome, found.reward, found.why) == (TIMEOUT, None, "not done within 1 s")
        for process in psutil.process_iter(["cmdline"]):
            assert process.info["cmdline"] != ["sleep", "3271"]


def test_a_memory_hog_is_unknown_and_others_are_judged(folder: Path) -> None:
    with opened(plan_of(folder, "hogs"), memory_limit_gib=1.5) as verifier:
        found = verifier.verify([(text, PROBLEM) for text in ("a", "hog", "b")])
    assert [one.outcome for one in found] == [CORRECT, CRASH, CORRECT]
    assert found[1].why == "out of memory (reward.memory_limit_gib = 1.5)"


def test_the_memory_limit_is_the_configurations(folder: Path) -> None:
    roomy = Reward(function="my_rewards:score", memory_limit_gib=7.0, workers=1, time_limit_s=30.0)
    with Verifier.configured(plan_of(folder, "score"), roomy) as verifier:
        [found] = verifier.verify([("len(bytes(5 * 2**30)) > 0", PROBLEM)])  # untouched, it costs nothing
    assert found.outcome is CORRECT


def test_what_a_function_prints_goes_to_standard_error(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with opened(plan_of(folder, "prints")) as verifier:
        assert [one.reward for one in verifier.verify([("x", PROBLEM)] * 2)] == [1.0, 1.0]
    assert capfd.readouterr() == ("", "from the function\n" * 2)


def test_facts_and_the_answer_are_told(folder: Path) -> None:
    with opened(plan_of(folder, "facts", correct_at=0.5)) as verifier:
        [found] = verifier.verify([("four", PROBLEM)])
    assert found == Verification(CORRECT, "four", reward=0.5, facts={"length": 4.0, "even": 1.0})


def test_several_functions_are_weighted_and_logged_by_name(folder: Path) -> None:
    plan = plan_of(
        folder,
        RewardFunction(use="integer", weight=0.7),
        RewardFunction(use="format", weight=0.2, name="form", options={"pattern": r"(?s)so .*\}"}),
        RewardFunction(use="my_rewards:times", weight=0.1, options={"factor": 0.1}),
        RewardFunction(use="my_rewards:facts", weight=0, name="facts"),
    )
    assert plan.needs_answers
    problem = Problem("1", "6*7=", "42")
    with opened(plan) as verifier:
        right, wrong = verifier.verify([(r"so" "\n" r"\boxed{42}", problem), (r"\boxed{24}", problem)])
    assert right.reward == pytest.approx(0.7 + 0.0 + 0.1 * 1.3)
    assert right.facts == {
        "integer": 1,
        "form": 0,
        "times": pytest.approx(1.3),
        "facts": 0.5,
        "length": 13,
        "even": 0,
    }
    assert right.outcome is WRONG
    assert (wrong.reward, wrong.extracted) == (pytest.approx(0.1), "24")


def test_weights_that_sum_to_one_make_a_response_correct(folder: Path) -> None:
    names = {"a": 0.7, "b": 0.2, "c": 0.1}
    functions = [RewardFunction(use="my_rewards:score", weight=w, name=name) for name, w in names.items()]
    with opened(plan_of(folder, *functions)) as verifier:
        [found] = verifier.verify([("1", PROBLEM)])
    assert found.outcome is CORRECT


def test_a_fact_that_two_functions_tell_is_refused(folder: Path) -> None:
    functions = [RewardFunction(use="my_rewards:facts", name=name) for name in ("a", "b")]
    with (
        opened(plan_of(folder, *functions)) as verifier,
        pytest.raises(RapoError, match="fact 'even', which another"),
    ):
        verifier.verify([("x", PROBLEM)])


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("my_rewards:scores", 'has no scores; did you mean "my_rewards:score"'),
        ("my_reward:score", 'did you mean "my_rewards:score"'),
        ("my_rewards:REWARD", "is 3, which cannot be called"),
        (
            "my_rewards:narrow",
            r"my_rewards.py:3\) takes \(response\), but it is called as narrow\(response, problem\)",
        ),
        ("my_rewards:times", r"called as times\(response, problem\): missing a required .*'factor'; give it"),
        ("broken:score", '(?s)broken fails when it is imported.*broken.py", line 1.*ZeroDivisionError'),
    ],
)
def test_a_function_that_does_not_fit_is_refused_before_anything_is_judged(
    tmp_path: Path, use: str, message: str
) -> None:
    folder = tmp_path
    (folder / "my_rewards.py").write_text(f"REWARD = 3\n\ndef narrow(response): ...\n{REWARDS}")
    (folder / "broken.py").write_text("1 / 0")
    plan = RewardPlan(Reward(function=use).parts(), 1.0, (folder,))
    with pytest.raises(RapoError, match=message):
        opened(plan)


def test_options_that_a_function_does_not_take_are_refused(folder: Path) -> None:
    with pytest.raises(RapoError, match=r"called as score\(response, problem, factor=…\)"):
        opened(plan_of(folder, RewardFunction(use="my_rewards:score", options={"factor": 1})))


def test_a_reward_of_an_installed_package_needs_no_folder(tmp_path: Path) -> None:
    """A folder of PYTHONPATH is what `pip install` fills; the trainer is a process of its own."""
    package = tmp_path / "site" / "their_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "scores.py").write_text("from . import __name__ as n\ndef score(r, p): return 0.5")
    script = """
from megatron_rapo.config.reward import Reward
from megatron_rapo.config.reward import TAKEN
from megatron_rapo.config.verifiers import RewardPlan
from megatron_rapo.episode.problem import Problem
from megatron_rapo.reward.verifier import Verifier
plan = RewardPlan(Reward(function="their_package.scores:score").parts())
with Verifier(plan, workers=1, time_limit_s=20.0) as verifier:
    print(verifier.verify([("x", Problem("", ""))])[0].reward)
"""
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout == "0.5\n"


def test_files_of_the_users_folder_do_not_stand_in_for_pythons_own(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "my_rewards.py").write_text("def score(response, problem): return 1")
    for name in ("resource", "signal", "json"):
        (folder / f"{name}.py").write_text("raise SystemExit('not this one')")
    with opened(plan_of(folder, "score")) as verifier:
        assert verifier.verify([("1", PROBLEM)])[0].outcome is CORRECT


def test_threads_and_event_loops_may_ask_at_the_same_time(folder: Path) -> None:
    with opened(plan_of(folder, "score"), workers=2) as verifier:

        async def ask(n: int) -> Verification:
            return await verifier.score(f"time.sleep(0.01) or {n}", PROBLEM)

        async def several(first: int) -> list[float | None]:
            return [one.reward for one in await asyncio.gather(*(ask(first + n) for n in range(10)))]

        def plainly(first: int) -> list[float | None]:
            return [one.reward for one in verifier.verify([(str(first + n), PROBLEM) for n in range(10)])]

        with ThreadPoolExecutor(4) as threads:
            loops = [threads.submit(asyncio.run, several(first)) for first in (0, 100)]
            plain = [threads.submit(plainly, first) for first in (200, 300)]
            found = [one.result(timeout=60) for one in [*loops, *plain]]
    assert found == [[float(first + n) for n in range(10)] for first in (0, 100, 200, 300)]


def test_who_gave_up_waiting_costs_the_others_nothing(folder: Path) -> None:
    async def ask(verifier: Verifier) -> float | None:
        waits = [asyncio.ensure_future(verifier.score("time.sleep(0.2) or 1", PROBLEM)) for _ in range(60)]
        await asyncio.sleep(0.05)
        for one in waits:
            one.cancel()
        return (await verifier.score("0.5", PROBLEM)).reward

    with opened(plan_of(folder, "score")) as verifier:
        started = time.monotonic()
        assert asyncio.run(ask(verifier)) == 0.5
        assert time.monotonic() - started < 10.0  # one of them was begun; all take twelve


def test_closing_and_errors_reach_everyone_who_waits(folder: Path) -> None:
    async def ask(verifier: Verifier) -> list[Any]:
        waits = [verifier.score(text, PROBLEM) for text in ("time.sleep(600)", "'no number'", "1")]
        return await asyncio.gather(*waits, return_exceptions=True)

    with opened(plan_of(folder, "score"), workers=2) as verifier:
        found = asyncio.run(ask(verifier))
        assert [type(one) for one in found] == [RapoError] * 3
        with pytest.raises(RuntimeError, match="closed"):
            verifier.verify([("1", PROBLEM)])
    with opened(plan_of(folder, "score")) as verifier, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(verifier.verify, [("time.sleep(600)", PROBLEM)])
        time.sleep(0.1)
        verifier.close()
        with pytest.raises(RuntimeError, match="was closed meanwhile"):
            waiting.result(timeout=20)


def test_columns_that_cannot_travel_are_told(folder: Path) -> None:
    problem = Problem("p9", "", columns={"check": lambda: 1})
    with (
        opened(plan_of(folder, "score")) as verifier,
        pytest.raises(RapoError, match="problem p9 cannot be handed"),
    ):
        verifier.verify([("1", problem)])


def test_golds_are_judged_by_the_verifiers_among_the_functions(folder: Path) -> None:
    plan = plan_of(folder, RewardFunction(use="integer"), RewardFunction(use="my_rewards:fails", name="x"))
    with opened(plan) as verifier:
        assert [one.outcome for one in verifier.judge(["12", "1.5"])] == [CORRECT, CRASH]
    assert not plan_of(folder, "score").needs_answers


def test_plans_are_told_apart_by_their_names(folder: Path) -> None:
    own = RewardFunction(use="my_rewards:times", weight=0.25, options={"factor": 2})
    assert str(built_in("math")) == "math"
    assert str(plan_of(folder, "score")) == "my_rewards:score"
    assert str(plan_of(folder, "score", correct_at=0.5)) == "my_rewards:score, correct at 0.5"
    several = plan_of(folder, RewardFunction(use="math"), own)
    assert str(several) == "1 math + 0.25 my_rewards:times(factor=2)"


def configured(**reward: Any) -> RunConfig:
    options: dict[str, Any] = {
        "run": {"directory": "runs/x", "steps": 3},
        "model": {"path": "model"},
        "data": {"source": "countdown"},
        "rollout": {"prompts_per_step": 4, "max_response_tokens": 8},
        "reward": reward,
    }
    return validate(options, source="test")


def test_the_configuration_says_what_judges() -> None:
    config = configured(function="my_rewards:score", correct_at=0.5)
    assert str(config.verifier_of(config.data)) == "my_rewards:score, correct at 0.5"
    config = configured(functions=[{"use": "countdown"}, {"use": "my_rewards:score", "weight": 0.5}])
    assert str(config.verifier_of(config.data)) == "1 countdown + 0.5 my_rewards:score"
    assert [part.name for part in config.verifier_of(config.data).parts] == ["countdown", "score"]


def test_a_data_set_may_have_a_reward_of_its_own() -> None:
    options = configured(function="a:b").resolved()
    own = {"source": "file", "path": "x.jsonl", "reward": {"function": "c:d", "correct_at": 0.5}}
    options |= {
        "evaluate": {"data": [own, {"source": "arithmetic", "reward": {"verifier": "math"}}, options["data"]]}
    }
    config = validate(options, source="test")
    plans = [config.verifier_of(data) for data in [config.data, *config.evaluation_data]]
    assert list(map(str, plans)) == ["a:b", "c:d, correct at 0.5", "math", "a:b"]
    assert [plan.needs_answers for plan in plans] == [False, False, True, False]
    assert plans[1].parts[0].option == "x: reward.function"
    assert validate(config.resolved(), source="copy") == config
    own["reward"] = {"verifier": "countdown"}
    with pytest.raises(RapoError, match='"countdown" cannot check source of x = "file"'):
        validate(options, source="test")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"function": "my_rewards.score"},
            'reward.function = "my_rewards.score" is no address; write "my_rewards:score"',
        ),
        ({"function": "math"}, 'reward.function = "math" is a verifier; set verifier to it'),
        (
            {"function": "a:b", "functions": [{"use": "a:c"}]},
            r"reward.function and functions are both set; keep one, or name all in functions with",
        ),
        ({"verifier": "countdown", "function": "a:b"}, "reward.verifier and function are both set"),
        (
            {"correct_at": 0.5},
            "reward.correct_at = 0.5 would have no effect: a verifier says what is correct",
        ),
        (
            {"functions": [{"use": "maths"}]},
            r'functions\[0\].use = "maths" is no address; write .*, or one of math',
        ),
        (
            {"functions": [{"use": "a:mean"}]},
            "logged as reward/mean, which has another meaning; give another",
        ),
        ({"functions": [{"use": "a:b", "name": "x y"}]}, "which is no name of a metric"),
        ({"functions": [{"use": "a:b"}, {"use": "c:b"}]}, 'functions has 2 of the name "b"'),
        ({"functions": [{"use": "a:b", "weight": 0.0}]}, "functions have the weight 0 all"),
        ({"functions": [{"use": "a:b", "weight": float("nan")}]}, "weight = NaN: must be a finite number"),
        ({"functions": [{"use": "format"}]}, '"format" takes { pattern = "…" }; give that alone'),
        (
            {"functions": [{"use": "format", "options": {"pattern": "("}}]},
            r"options.pattern = '\(' is no regular",
        ),
        (
            {"functions": [{"use": "countdown", "options": {"a": 1}}]},
            'would have no effect: "countdown" has none',
        ),
        (
            {"functions": [{"use": "math"}]},
            r'functions\[0\].use = "math" cannot check data.source = "countdown"',
        ),
    ],
)
def test_options_that_cannot_be_meant_are_refused(reward: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RapoError, match=message):
        configured(**reward)
