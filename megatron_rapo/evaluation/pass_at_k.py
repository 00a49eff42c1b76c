"""pass@k: the chance that at least one of k samples solves a problem, from N ≥ k samples of it.

The estimator is that of Chen et al. 2021 (arXiv 2107.03374): the share of k-subsets of the N samples that
hold a correct one, 1 − C(N − c, k) / C(N, k). It is unbiased; 1 − (1 − c/N)^k is not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer]


def pass_at_k(correct: Integers, samples: int | Integers, k: int) -> Floats:
    """pass@k of each problem.

    Args:
        correct: `[problems]`, how many of a problem's samples are correct.
        samples: N, samples of each problem; `[problems]` where they have different numbers, which must not
            have been chosen by their outcomes.
        k: from 1 to N.

    Returns:
        `[problems]`, each from 0 to 1.

    Raises:
        ValueError: k is not from 1 to N, or a count not from 0 to N.
    """
    counts = np.asarray(correct)
    if not isinstance(samples, int | np.integer):
        values = np.empty(len(counts))
        for number in np.unique(samples):
            values[samples == number] = pass_at_k(counts[samples == number], int(number), k)
        return values
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k} is not from 1 to the {samples} samples of a problem")
    if counts.size and not (counts.min() >= 0 and counts.max() <= samples):
        raise ValueError(f"correct = {counts.min()} to {counts.max()} is not from 0 to {samples} samples")
    solved: Floats = _by_count(int(samples), k)[counts]
    return solved


def _by_count(samples: int, k: int) -> Floats:
    """`[samples + 1]`, pass@k for each count of correct samples.

    C(N − c, k) / C(N, k) is a product over c of (N − c − k) / (N − c): no factorial that overflows, and
    no difference of large logarithms.
    """
    wrong = np.arange(samples, 0, -1)
    missed = np.cumprod(np.maximum(wrong - k, 0) / wrong)
    return 1.0 - np.concatenate([[1.0], missed])
