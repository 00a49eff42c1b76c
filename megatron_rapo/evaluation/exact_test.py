"""Whether two models solve a problem as often, where an adaptive budget ended the samples of one or both.

Fisher's test takes the numbers of samples as given, which successes decided here; and given the successes and
failures of both, so few outcomes are left that nothing could ever be significant. So this is Barnard's way
(1945, "A new test for 2 × 2 tables"): of all outcomes that the budgets allow, those whose likelihood ratio
against a common chance of success is as large; p is their probability, at the common chance that makes it
largest. That is at most α with probability α, whatever that chance is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import xlogy

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]

_NEGLIGIBLE = 1e-15  # probability of an outcome that is not looked at; it is added to p
_FEWEST_CHANCES = 128
_EQUAL = 1e-9  # likelihood ratios that differ by less are the same


class Budget(NamedTuple):
    """How a problem's samples end: at N, or earlier at the `stop`-th correct one."""

    samples: int
    stop: int | None = None

    def outcomes(self) -> tuple[Integers, Integers]:
        """(correct, drawn) of all that can come out."""
        if self.stop is None:
            return np.arange(self.samples + 1), np.full(self.samples + 1, self.samples)
        ended = np.arange(self.stop, self.samples + 1)  # samples until the last correct one
        correct = np.concatenate([np.arange(self.stop), np.full(len(ended), self.stop)])
        return correct, np.concatenate([np.full(self.stop, self.samples), ended])

    def probabilities(self, chance: float) -> Floats:
        """That of each of `outcomes`, where a sample is correct with this chance."""
        from scipy.stats import binom, nbinom  # late: it takes a second, which a refusal must not cost

        if self.stop is None:
            return np.asarray(binom.pmf(np.arange(self.samples + 1), self.samples, chance))
        failures = np.arange(self.samples - self.stop + 1)
        open_to_the_end = binom.pmf(np.arange(self.stop), self.samples, chance)
        return np.concatenate([open_to_the_end, nbinom.pmf(failures, self.stop, chance)])


def p_values(
    base: Budget, model: Budget, observed: Sequence[tuple[tuple[int, int], tuple[int, int]]]
) -> list[float]:
    """p of each observation ((correct, drawn) of the base, of the model), two-sided.

    Args:
        base, model: budgets with at least one sample, and `stop` of at most as many.
        observed: outcomes that these budgets allow.
    """
    pairs = np.array(observed).reshape(-1, 2, 2)
    seen = _likelihood_ratio(*pairs[:, 0].T, *pairs[:, 1].T)
    levels = np.unique(seen) - _EQUAL
    (old_correct, old_drawn), (new_correct, new_drawn) = base.outcomes(), model.outcomes()
    # How many levels each outcome reaches; row by row, as there may be some million outcomes.
    reached = np.stack(
        [
            np.searchsorted(levels, _likelihood_ratio(correct, drawn, new_correct, new_drawn), side="right")
            for correct, drawn in zip(old_correct, old_drawn, strict=True)
        ]
    ).astype(np.int32)
    largest = np.zeros(len(levels))
    for chance in _chances(max(base.samples, model.samples)):
        old, new = base.probabilities(chance), model.probabilities(chance)
        some_old, some_new = np.flatnonzero(old > _NEGLIGIBLE), np.flatnonzero(new > _NEGLIGIBLE)
        mass = np.bincount(
            reached[np.ix_(some_old, some_new)].ravel(),
            np.outer(old[some_old], new[some_new]).ravel(),
            minlength=len(levels) + 1,
        )
        below = np.cumsum(mass)[:-1]
        beyond = mass[::-1].cumsum()[::-1][1:] + max(0.0, 1 - below[-1] - mass[-1])
        largest = np.maximum(largest, beyond)
    places = np.searchsorted(levels + _EQUAL, seen)
    return np.minimum(largest[places], 1.0).tolist()


def _likelihood_ratio(
    old_correct: Integers, old_drawn: Integers, new_correct: Integers, new_drawn: Integers
) -> Floats:
    """Log of how much likelier two chances make the outcome than one; how it was stopped cancels out."""

    def best(correct: Integers, drawn: Integers) -> Floats:
        wrong = drawn - correct
        return np.asarray(xlogy(correct, correct / drawn) + xlogy(wrong, wrong / drawn))

    apart = best(old_correct, old_drawn) + best(new_correct, new_drawn)
    return apart - best(old_correct + new_correct, old_drawn + new_drawn)


def _chances(samples: int) -> Floats:
    """Chances between 0 and 1, at most a quarter of a standard error of the share of N samples apart."""
    steps = max(_FEWEST_CHANCES, int(np.ceil(4 * np.pi * np.sqrt(samples))))
    return np.sin(np.linspace(0, np.pi / 2, steps + 2)[1:-1]) ** 2
