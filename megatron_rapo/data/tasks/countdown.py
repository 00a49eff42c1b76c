"""Countdown: reach a target with given numbers, each used exactly once, by + − × ÷ and brackets."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from fractions import Fraction

from megatron_rapo.config.data import CountdownData
from megatron_rapo.data.tasks.expression import MalformedExpression, flat_value, tokenize, value
from megatron_rapo.data.tasks.problem import Problem, Split, distinct
from megatron_rapo.errors import RapoError

LARGEST_TARGET = 99

_LONGEST_ANSWER = 100  # characters; bounds the parser's time and depth
_NOTATION = str.maketrans({"×": "*", "÷": "/", "−": "-"})


def generate(config: CountdownData, seed: int, split: Split, count: int) -> list[Problem]:
    """`count` different problems, the same for the same arguments.

    Numbers (1 to `config.largest`) and operators are drawn uniformly; the value of `a ∘ b ∘ c (∘ d)`, read
    with the usual precedence, is the target if it is a whole number from 1 to 99, and otherwise the draw is
    repeated. A problem's split hangs on its numbers (in any order) and target, so no test problem is
    trained on, whatever the seeds.

    Raises:
        RapoError: the options do not allow for so many problems.
    """
    rng = random.Random(f"countdown {split} {seed}")
    choices = range(1, config.largest + 1)

    def draw() -> tuple[str, Problem] | None:
        numbers = rng.choices(choices, k=config.numbers)
        target = flat_value(numbers, rng.choices(config.operators, k=config.numbers - 1))
        if target.denominator != 1 or not 1 <= target <= LARGEST_TARGET:
            return None
        problem = pose(numbers, int(target))
        return problem.answer, problem

    return distinct(draw, split, count, f"countdown ({config.model_dump(exclude={'source', 'problems'})})")


def pose(numbers: Sequence[int], target: int) -> Problem:
    """The problem's texts: `3 7 12 25=41:`, answered by JSON of the sorted numbers and the target."""
    answer = json.dumps({"numbers": sorted(numbers), "target": target}, separators=(",", ":"))
    question = f"{' '.join(map(str, numbers))}={target}:"
    return Problem(question, answer, {"numbers": list(numbers), "target": target})


def is_correct(response: str, answer: str) -> bool:
    """Whether the response's last line reaches the target.

    The last line that is not blank must be an expression of the given numbers, each used exactly once, with
    binary + − × ÷ (also `*` and `/`) and brackets; `= target` may follow it. Lines before it are free. The
    arithmetic is exact; a division by zero, a longer line than 100 characters and anything else are wrong.

    Raises:
        RapoError: `answer` is not what `generate` writes.
    """
    _, target = _read_answer(answer)
    _, equals, stated = (_last_line(response) or "").translate(_NOTATION).partition("=")
    if equals and stated.strip() != str(target):
        return False
    return comes_to(response, answer) == target


def comes_to(response: str, answer: str) -> Fraction | None:
    """The value of the last line's expression, where it uses the given numbers, each exactly once; else None.

    Raises:
        RapoError: `answer` is not what `generate` writes.
    """
    numbers, _ = _read_answer(answer)
    try:
        tokens = tokenize((_last_line(response) or "").translate(_NOTATION).partition("=")[0])
        used = sorted(int(token) for token in tokens if token.isdigit())
        return value(tokens) if used == numbers else None
    except (MalformedExpression, ZeroDivisionError):
        return None


def final_answer(response: str) -> str | None:
    """The response's last line, where it is an expression (and `= number` perhaps); else None."""
    last_line = _last_line(response)
    if last_line is None:
        return None
    try:
        value(tokenize(last_line.translate(_NOTATION).partition("=")[0]))
    except MalformedExpression:
        return None
    except ZeroDivisionError:
        pass  # an answer, if a wrong one
    return last_line.strip()


def _last_line(response: str) -> str | None:
    line = response.rstrip()[-_LONGEST_ANSWER - 1 :].rpartition("\n")[2]
    return line if len(line) <= _LONGEST_ANSWER else None


def _read_answer(answer: str) -> tuple[list[int], int]:
    try:
        fields = json.loads(answer)
        return sorted(int(number) for number in fields["numbers"]), int(fields["target"])
    except (ValueError, TypeError, KeyError) as error:
        raise RapoError(
            f"{answer!r} is not a countdown answer ({error!r}); "
            'it should read like {"numbers":[3,7,12,25],"target":41}'
        ) from error
