r"""Arithmetic: whole numbers joined by + − ×, answered in `\boxed{}`."""

from __future__ import annotations

import random
import re

from megatron_rapo.config.data import ArithmeticData
from megatron_rapo.data.tasks.expression import flat_value
from megatron_rapo.data.tasks.problem import Problem, Split, distinct
from megatron_rapo.errors import RapoError

_LONGEST_INTEGER = 40  # characters; the longest answer that the task can pose has 36 digits
_INTEGER = re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)")
_BOX = "\\boxed{"


def generate(config: ArithmeticData, seed: int, split: Split, count: int) -> list[Problem]:
    """`count` different problems such as `12+34*5=`, answered by `182`; the same for the same arguments.

    Numbers (1 to 10^digits − 1) and operators are drawn uniformly; × binds before + and −. A problem's split
    hangs on its numbers and operators in any order, so `34+12=` is never a test of `12+34=`.

    Raises:
        RapoError: the options do not allow for so many problems.
    """
    rng = random.Random(f"arithmetic {split} {seed}")
    choices = range(1, 10**config.digits)

    def draw() -> tuple[str, Problem]:
        numbers = rng.choices(choices, k=config.terms)
        operators = rng.choices(config.operators, k=config.terms - 1)
        question = str(numbers[0])
        for operator, number in zip(operators, numbers[1:], strict=True):
            question += f"{operator}{number}"
        parts = {"numbers": numbers, "operators": operators}
        problem = Problem(f"{question}=", str(flat_value(numbers, operators)), parts)
        return f"{sorted(numbers)} {sorted(operators)}", problem

    return distinct(draw, split, count, f"arithmetic ({config.model_dump(exclude={'source', 'problems'})})")


def is_correct(response: str, answer: str) -> bool:
    r"""Whether the response's last `\boxed{…}` holds exactly the answer's integer.

    Spaces around it, a sign (+, - or −), leading zeros, and commas that group thousands are allowed;
    anything else in the box, an unclosed box, and no box at all are wrong.

    Raises:
        RapoError: `answer` is not an integer.
    """
    expected = _integer(answer)
    if expected is None:
        raise RapoError(f"the gold answer {answer!r} is not an integer; correct it, or use another verifier")
    content = final_answer(response)
    return content is not None and _integer(content) == expected


def stating(answer: str) -> str:
    """A response that gives this gold answer."""
    return rf"\boxed{{{answer}}}"


def final_answer(response: str) -> str | None:
    """What the response's last box holds; None where there is no box, or it is not closed."""
    _, box, rest = response.rpartition(_BOX)
    content, closing, _ = rest.partition("}")
    return content if box and closing else None


def _integer(text: str) -> int | None:
    """The integer that the text holds, or None where it holds anything else."""
    text = text.strip().replace("−", "-")
    if len(text) > _LONGEST_INTEGER or not _INTEGER.fullmatch(text):
        return None
    return int(text.replace(",", ""))
