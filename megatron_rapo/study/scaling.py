"""Outcome against compute: outcome = a · compute^b, by least squares of the logarithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from megatron_rapo.study.crossed import CONFIDENCE

FEWEST = 3  # points of a run that a line is fitted to


@dataclass(frozen=True)
class PowerLaw:
    """A fit over seeds.

    Attributes:
        factor, exponent: a and b.
        low, high: Student's interval of the exponent, over seeds: points of one run are not independent.
        compute: the smallest and the largest that it was fitted to; it says nothing beyond.
        residual: root mean square of the logarithms' deviations.
        seeds: runs that were fitted, each by itself.
    """

    factor: float
    exponent: float
    low: float
    high: float
    compute: tuple[float, float]
    residual: float
    seeds: int

    def at(self, compute: float) -> float:
        """The outcome that it gives."""
        return float(self.factor * compute**self.exponent)


def power_law(runs: Mapping[int, Sequence[tuple[float, float]]]) -> PowerLaw | None:
    """Fits each run by itself; None where fewer than two have three points or more.

    Args:
        runs: by seed, (compute, outcome) of each evaluation, in TFLOP or tokens. Those at 0 or of an outcome
            of 0 have no logarithm, and are left out.
    """
    fits, residuals, compute = [], [], []
    for points in runs.values():
        logs = np.log([point for point in points if min(point) > 0]).reshape(-1, 2)
        if len(logs) < FEWEST or np.ptp(logs[:, 0]) == 0:
            continue
        slope, intercept = np.polyfit(logs[:, 0], logs[:, 1], 1)
        fits.append((float(slope), float(intercept)))
        residuals += (logs[:, 1] - slope * logs[:, 0] - intercept).tolist()
        compute += np.exp(logs[:, 0]).tolist()
    if len(fits) < 2:
        return None
    slopes = np.array([slope for slope, _ in fits])
    half = float(stdtrit(len(fits) - 1, (1 + CONFIDENCE) / 2) * slopes.std(ddof=1) / len(fits) ** 0.5)
    exponent = float(slopes.mean())
    return PowerLaw(
        factor=float(np.exp(np.mean([intercept for _, intercept in fits]))),
        exponent=exponent,
        low=exponent - half,
        high=exponent + half,
        compute=(min(compute), max(compute)),
        residual=float(np.sqrt(np.mean(np.square(residuals)))),
        seeds=len(fits),
    )
