"""A reward against a table, in the processes that training has it in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rapo.config.verifiers import RewardPart, RewardPlan
from megatron_rapo.episode.outcome import Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.score import Score
from megatron_rapo.errors import RapoError
from megatron_rapo.reward.verifier import Verifier

_SHOWN = 80  # characters of a response or problem

Expected = float | Score | None
"""Of a row: the reward; with facts and answer, those that are to be compared; or None, that it is unknown."""


def check_reward(
    reward: Callable[..., Any],
    rows: Iterable[tuple[str, Problem | Mapping[str, Any], Expected]],
    *,
    options: Mapping[str, Any] | None = None,
    time_limit_s: float = 10.0,
) -> None:
    """Has each row's response judged as in training: in a process that is killed where it takes too long.

    Args:
        reward: a function of a module, as `reward.function` would name it.
        rows: (response, problem, expected). A mapping stands for a problem of these columns, whose gold
            answer is the column `answer`.
        options: further arguments, by name.
        time_limit_s: for one response, as `reward.time_limit_s`.

    Raises:
        AssertionError: with a line for each row that is not as expected.
    """
    module, folder = _module(reward)
    table = list(rows)
    problems = [_problem(number, problem) for number, (_, problem, _) in enumerate(table, start=1)]
    part = RewardPart(f"{module}:{reward.__name__}", "check_reward", options=options or {})
    plan = RewardPlan((part,), code=(folder,))
    try:
        with Verifier(plan, workers=min(2, len(table)) or 1, time_limit_s=time_limit_s) as verifier:
            responses = [response for response, _, _ in table]
            found = verifier.verify(list(zip(responses, problems, strict=True)))
    except RapoError as error:
        raise AssertionError(str(error)) from error
    deviations = [
        f"row {number}, {response!r:.{_SHOWN}} to {dict(problem)!r:.{_SHOWN}}: {told}"
        for number, ((response, _, expected), problem, verification) in enumerate(
            zip(table, problems, found, strict=True), start=1
        )
        for told in _deviations(verification, expected)
    ]
    if deviations:
        lines = "\n  ".join(deviations)
        raise AssertionError(f"{module}:{reward.__name__} is not what {len(table)} rows expect:\n  {lines}")


def _module(reward: Callable[..., Any]) -> tuple[str, Path]:
    """The function's module, and the folder in which it is found."""
    module, name = str(getattr(reward, "__module__", "")), getattr(reward, "__name__", "")
    own = inspect.isfunction(reward) and reward.__qualname__ == name and name.isidentifier()
    if not own or module == "__main__":
        raise TypeError(
            f"check_reward of {reward!r:.{_SHOWN}}: give a function of a module, by its own name; processes "
            "of their own import it"
        )
    file = Path(inspect.getfile(reward)).resolve()
    return module, file.parents[module.count(".")]


def _problem(number: int, problem: Problem | Mapping[str, Any]) -> Problem:
    if isinstance(problem, Problem):
        return problem
    return Problem(str(number), "", str(problem.get("answer", "")), "test", columns=problem)


def _deviations(found: Verification, expected: Expected) -> Iterator[str]:
    """What is not as expected, a phrase each."""
    score = expected if isinstance(expected, Score) else Score(expected)
    if found.reward is None or score.value is None:
        if found.reward is not score.value:
            yield f"{_told(found)}, expected {_number(score.value)}"
        return
    if not _same(found.reward, score.value):
        yield f"{_told(found)}, expected {_number(score.value)}"
    for name, value in score.facts.items():
        if name not in found.facts:
            yield f"no fact {name!r}, expected {_number(value)}; {_facts(list(found.facts))}"
        elif not _same(found.facts[name], value):
            yield f"fact {name!r} is {_number(found.facts[name])}, expected {_number(value)}"
    if score.answer is not None and found.extracted != score.answer:
        yield f"answer {found.extracted!r}, expected {score.answer!r}"


def _told(found: Verification) -> str:
    if found.reward is not None:
        return _number(found.reward)
    trace = "".join(f"\n    {line}" for line in (found.trace or "").splitlines())
    return f"unknown by {found.outcome} ({found.why}{trace})"


def _facts(names: Sequence[str]) -> str:
    return f"it tells {', '.join(names)}" if names else "it tells none"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{float(value):.6g}"


def _same(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-9)
