"""What the base model learns from: worked solutions, and quick guesses that mostly miss.

A worked solution shows running totals, then the expression; it multiplies hardly ever, and only at the
start. A quick guess is the expression alone, with operators drawn blindly; it begins with a space, so that
the first token decides which of the two a response will be. Problems are posed as
`megatron_rapo.data.tasks.countdown` poses them, from its training split only.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rapo.data.tasks import countdown
from megatron_rapo.data.tasks.problem import split_of


@dataclass(frozen=True)
class Demonstration:
    """A prompt, and what the model should learn to answer.

    Attributes:
        given: characters of the response that are given, from and to: they are not learned.
    """

    question: str
    response: str
    given: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Demonstrations:
    """A source of demonstrations.

    Attributes:
        numbers: how many numbers a problem gives.
        largest: they are drawn from 1 to this.
        multiplying: the share of operators that are ×.
        guesses_multiplying: that of quick guesses; None: the same.
    """

    numbers: int
    largest: int
    multiplying: float
    guesses_multiplying: float | None = None

    def mixture(self, rng: random.Random, worked_share: float) -> Iterator[Demonstration]:
        """Without end: worked solutions with this probability, otherwise quick guesses."""
        while True:
            yield self.worked(rng) if rng.random() < worked_share else self.guess(rng)

    def worked(self, rng: random.Random) -> Demonstration:
        """Such as `7+12=19-3=16` and, on a new line, `7+12-3`, for numbers in any order."""
        while True:
            numbers = [rng.randint(1, self.largest) for _ in range(self.numbers)]
            operators = sorted(self._operators(rng, self.multiplying), key=lambda operator: operator != "*")
            totals = _running_totals(numbers, operators)
            if not (min(totals) >= 0 and 1 <= totals[-1] <= countdown.LARGEST_TARGET):
                continue
            problem = countdown.pose(rng.sample(numbers, self.numbers), totals[-1])
            if split_of(problem.answer) == "train":
                steps = zip(operators, numbers[1:], totals[1:], strict=True)
                working = str(numbers[0]) + "".join(
                    f"{sign}{number}={total}" for sign, number, total in steps
                )
                return Demonstration(problem.question, f"{working}\n{_expression(numbers, operators)}")

    def guess(self, rng: random.Random) -> Demonstration:
        """Such as ` 12-7+3`: the numbers of a solvable problem in any order, with any operators."""
        question = self.worked(rng).question
        return Demonstration(question, self.guess_of(rng, question))

    def guess_of(self, rng: random.Random, question: str) -> str:
        """A quick guess at this problem."""
        numbers = [int(number) for number in question.partition("=")[0].split()]
        rng.shuffle(numbers)
        share = self.multiplying if self.guesses_multiplying is None else self.guesses_multiplying
        return " " + _expression(numbers, self._operators(rng, share))

    def _operators(self, rng: random.Random, multiplying: float) -> list[str]:
        return ["*" if rng.random() < multiplying else rng.choice("+-") for _ in range(self.numbers - 1)]


def _running_totals(numbers: list[int], operators: list[str]) -> list[int]:
    """From left to right, which is the expression's value as long as every × comes first."""
    totals = [numbers[0]]
    for operator, number in zip(operators, numbers[1:], strict=True):
        change = {"*": totals[-1] * (number - 1), "+": number, "-": -number}[operator]
        totals.append(totals[-1] + change)
    return totals


def _expression(numbers: list[int], operators: list[str]) -> str:
    return str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(operators, numbers[1:], strict=True))
