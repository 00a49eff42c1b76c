"""maj@k: whether the answer that most of k samples give is correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

DRAWS = 200  # k-subsets of a problem's samples that the mean is taken over; at k = N there is but one

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def majority_at_k(votes: Integers, ks: Sequence[int], generator: np.random.Generator) -> Mapping[int, float]:
    """maj@k of one problem, for each k: the mean over subsets of k of its samples.

    The answer with most votes is taken; of several with as many, one at random (so each counts its share).
    Without any vote nothing is right.

    Args:
        votes: `[samples]`, which answer each sample gives: 0 the correct one, however it is written; -1 none.
        ks: each from 1 to the number of samples.
        generator: draws the subsets.

    Raises:
        ValueError: a k is not from 1 to the number of samples.
    """
    if not ks or min(ks) < 1 or max(ks) > len(votes):
        raise ValueError(f"k = {list(ks)} needs values from 1 to the {len(votes)} samples of a problem")
    answers, compact = np.unique(votes, return_inverse=True)
    # A permutation's first k samples are a subset of k: one permutation serves every k.
    order = generator.permuted(np.broadcast_to(compact, (DRAWS, len(votes))), axis=1)
    result = {}
    for k in ks:
        drawn = order if k < len(votes) else order[:1]
        result[k] = float(_right(drawn[:, :k], answers).mean())
    return result


def _right(drawn: Integers, answers: Integers) -> Floats:
    """`[subsets]`: the chance that the answer of each subset's majority is the correct one."""
    rows = len(drawn)
    counts = np.bincount(
        (drawn + np.arange(rows)[:, None] * len(answers)).ravel(), minlength=rows * len(answers)
    ).reshape(rows, len(answers))
    counts[:, answers == -1] = 0
    most = counts.max(axis=1, keepdims=True)
    leaders = (counts == most) & (most > 0)
    correct = leaders[:, answers == 0].any(axis=1)
    return correct / np.maximum(leaders.sum(axis=1), 1)
