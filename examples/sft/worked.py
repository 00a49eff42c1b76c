"""Worked solutions of Countdown: running totals, then the expression, as `tools/tiny_model` taught them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

from megatron_rapo.data.tasks import countdown
from megatron_rapo.data.tasks.problem import split_of

LARGEST = 25  # numbers are drawn from 1 to this


def problems(count: int | None = None, seed: int = 1234) -> list[Mapping[str, str]]:
    """Different problems of the training split, 2,000 by default: each a `question` and its `solution`."""
    rng = random.Random(seed)
    found: dict[str, Mapping[str, str]] = {}
    for question, solution in _drawn(rng):
        found[question] = {"question": question, "solution": solution}
        if len(found) == (count or 2000):
            return list(found.values())
    raise AssertionError("draws have no end")


def _drawn(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Such as `3 7 12=16:`, solved by `7+12=19-3=16` and, on a new line, `7+12-3`."""
    while True:
        numbers = [rng.randint(1, LARGEST) for _ in range(3)]
        signs = [rng.choice((1, -1)) for _ in range(2)]
        first = numbers[0] + signs[0] * numbers[1]
        last = first + signs[1] * numbers[2]
        problem = countdown.pose(rng.sample(numbers, 3), last)
        if first < 0 or not 1 <= last <= countdown.LARGEST_TARGET or split_of(problem.answer) != "train":
            continue
        one, two = ("+" if sign > 0 else "-" for sign in signs)
        working = f"{numbers[0]}{one}{numbers[1]}={first}{two}{numbers[2]}={last}"
        yield problem.question, f"{working}\n{numbers[0]}{one}{numbers[1]}{two}{numbers[2]}"
