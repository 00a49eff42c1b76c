"""Means over problems with 95% intervals.

Problems are what varies from one test set to another: they are the observations, and the samples of one
problem stay together. Values have ends (0 and 1, or −1 and 1), and test sets are small: where nearly all
values lie at one end, those that were seen tell too little of their spread. So two pseudo-problems are added,
one at each end, as Agresti and Coull 1998 ("Approximate is better than 'exact'") do for proportions, and
Agresti and Min 2005 for differences on the same problems; then it is Student's interval of the mean. In
closed form: nothing is resampled, and the same values have the same interval.

`tools/bench_intervals.py` measures how often it covers the truth, and how wide it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Floats = npt.NDArray[np.float64]

_CONFIDENCE = 0.95
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% interval, which holds the mean and keeps within the values' ends."""

    mean: float
    low: float
    high: float


def estimate(values: Floats) -> Estimate:
    """The mean of values from 0 to 1, `[problems]`, such as pass@k or maj@k."""
    return estimates(values[:, None])[0]


def estimate_between(values: Floats, ends: tuple[float, float]) -> Estimate:
    """The mean of values from the one end to the other, `[problems]`, such as rewards."""
    return _estimates(values[:, None], ends, np.ones(1))[0]


def estimates(values: Floats) -> list[Estimate]:
    """The mean of each column of values from 0 to 1, `[problems, columns]`.

    Raises:
        ValueError: there are no problems, or a value is not from 0 to 1.
    """
    return _estimates(values, (0.0, 1.0), np.ones(values.shape[1]))


def estimate_difference(values: Floats) -> Estimate:
    """The mean of differences from −1 to 1, `[problems]`, of two models on the same problems."""
    return estimate_differences(values[:, None])[0]


def estimate_differences(values: Floats) -> list[Estimate]:
    """The mean of each column of differences from −1 to 1, `[problems, columns]`.

    Most differences are far smaller than 1. A whole pseudo-problem at each end would then decide the width,
    so each weighs 1 / (1 + m), where m is how many problems the spread hangs on: (Σ e²)² / Σ e⁴ of the
    deviations e from the mean, which is 0 without any and n/3 of n normal ones.

    Raises:
        ValueError: there are no problems, or a value is not from −1 to 1.
    """
    if len(values) == 0:
        raise ValueError("the mean of no problems has no interval; evaluate at least one problem")
    deviations = values - values.mean(axis=0)
    # Equal values deviate from their mean by rounding, which is no spread.
    squares = np.where(np.abs(deviations) > _ROUNDING, deviations, 0.0) ** 2
    fourth = (squares**2).sum(axis=0)
    carriers = np.divide(squares.sum(axis=0) ** 2, fourth, out=np.zeros_like(fourth), where=fourth > 0)
    return _estimates(values, (-1.0, 1.0), 1 / (1 + carriers))


def _estimates(values: Floats, ends: tuple[float, float], weight: Floats) -> list[Estimate]:
    """Student's interval after a pseudo-problem of `weight`, `[columns]`, at each end."""
    problems = len(values)
    if problems == 0:
        raise ValueError("the mean of no problems has no interval; evaluate at least one problem")
    lowest, highest = ends
    if values.min() < lowest - _ROUNDING or values.max() > highest + _ROUNDING:
        raise ValueError(
            f"values from {values.min()} to {values.max()} are not from {lowest:g} to {highest:g}"
        )
    total = problems + 2 * weight
    centre = (values.sum(axis=0) + weight * (lowest + highest)) / total
    squares = ((values - centre) ** 2).sum(axis=0)
    squares += weight * ((lowest - centre) ** 2 + (highest - centre) ** 2)
    half = float(stdtrit(problems, (1 + _CONFIDENCE) / 2)) * np.sqrt(squares) / total
    low, high = np.maximum(centre - half, lowest), np.minimum(centre + half, highest)
    return [
        Estimate(*one) for one in zip(values.mean(axis=0).tolist(), low.tolist(), high.tolist(), strict=True)
    ]
