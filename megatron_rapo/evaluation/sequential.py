"""Sampling that stops early: a problem is done at its r-th correct sample, or at N.

Easy problems end after about r / p samples, so that the budget goes where few samples are correct. The share
c / n of such a problem is biased upwards, as it ends on a success. What stays unbiased for every k ≤ N is the
chance, given where sampling stopped, that the first k samples hold a correct one (Girshick, Mosteller and
Savage 1946, "Unbiased estimates for certain binomial sampling problems"). Stopped at its r-th success in the
n-th sample, every order of the n − 1 samples before it, with r − 1 correct ones, is as likely: their pass@k,
and 1 where k > n − 1. At N with fewer successes no order would have stopped before: pass@k as usual.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt

from megatron_rapo.evaluation.pass_at_k import pass_at_k

Integers = npt.NDArray[np.integer]


class Stopping:
    """Which problems are still open, as samples come in whatever order.

    Only samples from 0 on without a gap count: the r-th correct one among them ends a problem.
    """

    def __init__(self, correct: int) -> None:
        """`correct`: r."""
        self._correct = correct
        self._seen: defaultdict[str, dict[int, bool]] = defaultdict(dict)
        self._prefix: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))  # samples, correct ones

    def take(self, problem: str, sample: int, is_correct: bool) -> None:
        """A sample's outcome."""
        seen = self._seen[problem]
        seen[sample] = is_correct
        length, correct = self._prefix[problem]
        while length in seen:
            correct += seen.pop(length)
            length += 1
        self._prefix[problem] = (length, correct)

    def is_open(self, problem: str) -> bool:
        """Whether more samples of it are wanted."""
        return self._prefix[problem][1] < self._correct


def sequential_pass_at_k(stops: tuple[Integers, Integers], correct: int, k: int) -> npt.NDArray[np.float64]:
    """`[problems]` unbiased pass@k for k ≤ N.

    Args:
        stops: (correct, drawn), each `[problems]`, where each problem's sampling stopped.
        correct: r.
    """
    found, drawn = stops
    stopped = found == correct
    before = np.where(stopped, drawn - 1, drawn)
    enough = before >= k
    values = np.ones(len(found))  # k > n − 1: the success that stopped it is among the first k
    if (~enough & ~stopped).any():
        raise ValueError(f"k = {k} exceeds the {drawn[~stopped].min()} samples of a problem")
    values[enough] = pass_at_k(np.where(stopped, found - 1, found)[enough], before[enough], k)
    return values
