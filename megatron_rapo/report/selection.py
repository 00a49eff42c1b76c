"""Which responses the page holds: a stated, deterministic choice, since it cannot hold all of them.

Of each problem, model and outcome the first few in the order of their sample numbers: samples are
independent, so the first are as good as random ones, and nobody picked them. As many as keep the page within
its budget of tokens; then longer responses lose their middle; and if that is not enough, not every problem is
shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]

BUDGET = 400_000  # tokens, about 14 bytes each in the page
MOST = 3  # responses of one outcome to a problem by a model
LONGEST, SHORTEST = 1024, 256  # tokens shown of a response before its middle is left out
_FIRST = 0.75  # of the shown tokens stand before the gap


@dataclass(frozen=True)
class Samples:
    """The samples of one model on one data set, `[samples]` each.

    Attributes:
        problem: place of the problem in the data set.
        number: of the sample.
        outcome: any code of its outcome.
        length: tokens.
    """

    problem: Integers
    number: Integers
    outcome: Integers
    length: Integers


@dataclass(frozen=True)
class Rule:
    """How much of the samples is shown.

    Attributes:
        per_outcome: responses of each outcome, problem and model.
        tokens: of a response; a longer one loses its middle.
        stride: 1 where every problem is shown, n for every n-th.
    """

    per_outcome: int
    tokens: int
    stride: int

    def rows(self, samples: Samples) -> Integers:
        """The rows of the chosen samples, sorted by problem, outcome and number."""
        order = np.lexsort((samples.number, samples.outcome, samples.problem))
        problem, outcome = samples.problem[order], samples.outcome[order]
        starts = np.flatnonzero(np.r_[True, (np.diff(problem) != 0) | (np.diff(outcome) != 0)][: len(order)])
        sizes = np.diff(np.r_[starts, len(order)])
        rank = np.arange(len(order)) - np.repeat(starts, sizes)
        chosen: Integers = order[(rank < self.per_outcome) & (problem % self.stride == 0)]
        return chosen

    def shown_tokens(self, samples: Samples) -> int:
        """Tokens of the chosen samples that are shown."""
        return int(np.minimum(samples.length[self.rows(samples)], self.tokens).sum())

    def gap(self, length: int) -> tuple[int, int]:
        """Where the tokens that are left out begin, and how many they are (0: none)."""
        if length <= self.tokens:
            return length, 0
        return int(self.tokens * _FIRST), length - self.tokens

    def __str__(self) -> str:
        problems = {1: "each problem", 2: "every second problem", 3: "every third problem"}.get(
            self.stride, f"every {self.stride}th problem"
        )
        responses = "response" if self.per_outcome == 1 else f"{self.per_outcome} responses"
        return (
            f"for {problems} and model, the first {responses} of each outcome by sample number; of a "
            f"response longer than {self.tokens:,} tokens, the middle is left out"
        )


def choose_rule(samples: Sequence[Samples], budget: int = BUDGET) -> Rule:
    """The most generous rule that keeps within the budget.

    Args:
        samples: of all models and data sets that share the page.
        budget: tokens.
    """
    rules = [Rule(count, LONGEST, 1) for count in range(MOST, 0, -1)]
    length = LONGEST
    while (length := length // 2) >= SHORTEST:
        rules.append(Rule(1, length, 1))
    shown = 0
    for rule in rules:
        shown = sum(rule.shown_tokens(part) for part in samples)
        if shown <= budget:
            return rule
    stride = -(-shown // budget)
    while sum(Rule(1, SHORTEST, stride).shown_tokens(part) for part in samples) > budget:
        stride += 1
    return Rule(1, SHORTEST, stride)
