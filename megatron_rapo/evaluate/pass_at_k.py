"""pass@k: the chance that at least one of k samples solves a problem, from N ≥ k samples of it.

The estimator is that of Chen et al. 2021 (arXiv 2107.03374): the share of k-subsets of the N samples that
hold a correct one, 1 − C(N − c, k) / C(N, k). It is unbiased; 1 − (1 − c/N)^k is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.integer]

# Resampled problems that are held at a time, so that memory does not grow with the number of resamples.
_BLOCK = 2**22


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its confidence interval."""

    mean: float
    low: float
    high: float


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


def mean_pass_at_k(
    correct: Integers,
    samples: int | Integers,
    k: int,
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Estimate:
    """Mean pass@k over problems, with its interval from `bootstrap_interval`.

    Args:
        correct: `[problems]`, how many of a problem's samples are correct.
        samples: N, as in `pass_at_k`.
        k: from 1 to N.
        seed: the same seed gives the same interval.
        resamples: bootstrap resamples.
        confidence: share of resamples within the interval.
    """
    values = pass_at_k(correct, samples, k)
    low, high = bootstrap_interval(values, seed=seed, resamples=resamples, confidence=confidence)
    return Estimate(float(values.mean()), low, high)


def bootstrap_interval(
    values: Floats, *, seed: int, resamples: int = 10_000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean, from problems drawn anew with replacement.

    Problems are what varies from one test set to another; samples of one problem are no independent
    observations, so they stay together. A difference of two models' values on the same problems may be given.
    Where all values are alike the interval is a point: too few problems to tell, not certainty.

    Args:
        values: `[problems]`, at least one.
        seed: the same seed gives the same interval.
        resamples: bootstrap resamples.
        confidence: share of resamples within the interval.

    Raises:
        ValueError: there are no values.
    """
    problems = len(values)
    if problems == 0:
        raise ValueError("the mean of no problems has no interval; evaluate at least one problem")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK // problems)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = generator.integers(0, problems, size=(stop - start, problems), dtype=np.int32)
        means[start:stop] = values[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _by_count(samples: int, k: int) -> Floats:
    """`[samples + 1]`, pass@k for each count of correct samples.

    C(N − c, k) / C(N, k) is a product over c of (N − c − k) / (N − c): no factorial that overflows, and
    no difference of large logarithms.
    """
    wrong = np.arange(samples, 0, -1)
    missed = np.cumprod(np.maximum(wrong - k, 0) / wrong)
    return 1.0 - np.concatenate([[1.0], missed])
