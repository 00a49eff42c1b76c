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
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluate.counts import codes
from megatron_rapo.evaluate.pass_at_k import pass_at_k
from megatron_rapo.reward.outcome import Outcome

Integers = npt.NDArray[np.int64]


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


def stopping_points(
    samples: pyarrow.Table, problems: Sequence[str], correct: int, most: int
) -> tuple[Integers, Integers]:
    """(correct, drawn), each `[problems]`: where each problem's sampling stopped, later samples left out.

    Args:
        samples: columns problem, sample and outcome of a store.
        problems: ids.
        correct, most: r and N.

    Raises:
        RapoError: a problem is still open.
    """
    samples = samples.unify_dictionaries()
    rows = codes(samples["problem"], {name: place for place, name in enumerate(problems)})
    outcomes = codes(samples["outcome"], {outcome.value: place for place, outcome in enumerate(Outcome)})
    right = np.zeros((len(problems), most), dtype=bool)
    there = np.zeros((len(problems), most), dtype=bool)
    numbers = samples["sample"].to_numpy()
    right[rows, numbers] = outcomes == list(Outcome).index(Outcome.CORRECT)
    there[rows, numbers] = True
    reached = np.cumsum(right, axis=1) >= correct
    drawn = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, most)
    wanted = np.arange(most) < drawn[:, None]
    if (wanted & ~there).any():
        problem = problems[int((wanted & ~there).any(axis=1).argmax())]
        raise RapoError(
            f"problem {problem} is still open: it has neither {correct} correct samples nor {most} in all; "
            "finish the evaluation (run the same command again)"
        )
    return (right & wanted).sum(axis=1), drawn


def sequential_pass_at_k(stops: tuple[Integers, Integers], correct: int, k: int) -> npt.NDArray[np.float64]:
    """`[problems]` unbiased pass@k for k ≤ N.

    Args:
        stops: of `stopping_points`.
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
