"""Means over seeds and problems, each seed with each problem, with intervals.

    value[s, p] = mean + seed[s] + problem[p] + rest[s, p]

Both are samples: of the seeds that could have been drawn, and of the problems. The variance of the mean is
that of the two-way random-effects model, (MS_seed + MS_problem − MS_rest) / (S P), by its mean squares
(Searle, Casella and McCulloch 1992, ch. 4), and the interval is Student's with Satterthwaite's (1946) degrees
of freedom. The part of the problems has a pseudo-problem at each end, as `evaluation.interval` explains.

The bootstrap over both (Owen 2007, the pigeonhole bootstrap) is told beside it, and not claimed to hold: of
five seeds it resamples a spread that is √(4/5) too small, and knows no Student factor.
`tools/bench_studies.py` measures how often each covers the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 2_000
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Crossed:
    """A mean over seeds and problems.

    Attributes:
        mean: of all values.
        low, high: its interval.
        bootstrap: 2.5% and 97.5% of the bootstrap over both; None where it was not asked for.
        p_value: two-sided, of a mean of 0.
        error: standard error.
        freedom: degrees of freedom.
        seed_share: of the variance of the mean, what more seeds would lessen, from 0 to 1.
        seeds, problems: how many.
    """

    mean: float
    low: float
    high: float
    bootstrap: tuple[float, float] | None
    p_value: float
    error: float
    freedom: float
    seed_share: float
    seeds: int
    problems: int

    @property
    def width(self) -> float:
        """Of the interval."""
        return self.high - self.low

    def at(self, confidence: float) -> tuple[float, float]:
        """The interval at another confidence; not cut at the values' ends."""
        half = float(stdtrit(self.freedom, (1 + confidence) / 2)) * self.error
        return self.mean - half, self.mean + half


def crossed(values: Floats, ends: tuple[float, float], *, resamples: int = 0, seed: int = 0) -> Crossed:
    """The mean of values, `[seeds, problems]`, from the one end to the other.

    Args:
        values: at least two seeds and two problems.
        ends: the least and the largest that a value can be.
        resamples: of the bootstrap; 0: none.
        seed: of the resampling.

    Raises:
        ValueError: there are fewer.
    """
    seeds, problems = values.shape
    if seeds < 2 or problems < 2:
        raise ValueError(f"{seeds} seeds × {problems} problems have no spread; give two of each, or more")
    mean = float(values.mean())
    rows, columns = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - rows[:, None] - columns
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (problems - 1)) / values.size
    of_seeds = float(rows @ rows) / (seeds - 1) / seeds
    of_problems = _of_problems(columns + mean, ends)
    between = max(of_seeds - of_rest, 0.0)  # of the seeds themselves
    variance = of_problems + between
    freedom = float(problems)
    if between > 0:
        parts = of_problems**2 / problems + of_seeds**2 / (seeds - 1)
        freedom = variance**2 / (parts + of_rest**2 / ((seeds - 1) * (problems - 1)))
    error = variance**0.5
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return Crossed(
        mean=mean,
        low=max(mean - half, ends[0]),
        high=min(mean + half, ends[1]),
        bootstrap=_bootstrap(values, resamples, seed) if resamples else None,
        p_value=2 * float(stdtr(freedom, -abs(mean) / error)) if abs(mean) > _ROUNDING else 1.0,
        error=error,
        freedom=freedom,
        seed_share=min((between + of_rest) / variance, 1.0),
        seeds=seeds,
        problems=problems,
    )


def _of_problems(means: Floats, ends: tuple[float, float]) -> float:
    """The variance of the mean that problems cause, `means` over seeds being `[problems]`.

    Pseudo-problems weigh 1 / (1 + m), where m problems carry the spread (`estimate_differences`).
    """
    squares = np.where(np.abs(means - means.mean()) > _ROUNDING, means - means.mean(), 0.0) ** 2
    fourth = float((squares**2).sum())
    weight = 1 / (1 + (float(squares.sum()) ** 2 / fourth if fourth > 0 else 0.0))
    total = len(means) + 2 * weight
    centre = (float(means.sum()) + weight * sum(ends)) / total
    spread = float(((means - centre) ** 2).sum()) + weight * sum((end - centre) ** 2 for end in ends)
    return spread / total**2


def _bootstrap(values: Floats, resamples: int, seed: int) -> tuple[float, float]:
    """Means of resampled seeds with resampled problems."""
    generator = np.random.default_rng(seed)
    weights = [generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in values.shape]
    means = np.einsum("bs,bs->b", weights[0], weights[1] @ values.T)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
