"""What the base model is taught before it meets turns and tools: to try again, and to have sums calculated.

Little of either: RL has to find out what they are worth.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rapo.config import ArithmeticData
from megatron_rapo.data.tasks import arithmetic, countdown
from megatron_rapo.data.tasks.problem import Problem
from tiny_model.demonstrations import Demonstration, Demonstrations
from tiny_model.tokenizer import EOS


@dataclass(frozen=True)
class Retries:
    """Countdown, in which up to two guesses failed before, and were told what they come to.

    Written as `examples/turns/run.toml` has it: guess and end of sequence, `=19`, and the question again.
    """

    countdown: Demonstrations

    def mixture(self, rng: random.Random, worked_share: float) -> Iterator[Demonstration]:
        """Without end: the same responses as without failed guesses."""
        for one in self.countdown.mixture(rng, worked_share):
            earlier = "".join(self._failed(rng, one.question) for _ in range(rng.randrange(3)))
            yield Demonstration(earlier + one.question, one.response)

    def _failed(self, rng: random.Random, question: str) -> str:
        numbers, _, target = question.rstrip(":").partition("=")
        problem = countdown.pose([int(number) for number in numbers.split()], int(target))
        while True:
            guess = self.countdown.guess_of(rng, question)
            value = countdown.comes_to(guess, problem.answer)
            if value is not None and value != int(target):
                return f"{question}{guess}{EOS}={value}\n"


@dataclass(frozen=True)
class Calls:
    """Arithmetic, answered at once or after a calculator was asked, as `examples/tools` has it."""

    problems: tuple[Problem, ...]

    @classmethod
    def of(cls, task: ArithmeticData, seed: int) -> Calls:
        """Of training problems."""
        return cls(tuple(arithmetic.generate(task, seed, "train", task.problems)))

    def mixture(self, rng: random.Random, called_share: float) -> Iterator[Demonstration]:
        """Without end: with this probability a call, its answer, which is given, and what is said then."""
        while True:
            problem = rng.choice(self.problems)
            stated = arithmetic.stating(problem.answer)
            if rng.random() >= called_share:
                yield Demonstration(problem.question, stated)
                continue
            answer = f"{problem.answer}\n"
            start = len(problem.question)
            given = (start, start + len(answer))
            yield Demonstration(problem.question, f"{problem.question}{answer}{stated}", given)
