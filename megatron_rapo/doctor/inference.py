"""From which distribution tokens were drawn, and of which one the reported log-probs are.

Both ask which of a few candidates explains the data best: the temperature asked for with full support,
another temperature, or a support cut by top-p, top-k or min-p. Tokens are judged by their likelihood,
log-probs by how near they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_rapo.doctor.readings import (
    FACTORS,
    MIN_P,
    TOP_K,
    TOP_P,
    Array,
    Readings,
    above_with,
    share_with,
)

# Another candidate must make the tokens e^15 times as likely: chance does that once in millions of times.
EVIDENCE_NATS = 15.0
# And the temperature of what was drawn must be off by more than this: two steps of the grid.
TEMPERATURE_STEP = 2.0 ** (2 / 16)
# A candidate must leave less than this part of the difference of log-probs.
REMAINS = 1 / 3


@dataclass(frozen=True)
class Reading:
    """A distribution that may be behind tokens or log-probs.

    Attributes:
        kind: what it differs in from the one asked for.
        parameter: the temperature, or that of the truncation.
        log_probs: `[tokens]`; -inf where it never draws the token.
    """

    kind: Literal["asked", "temperature", "all_rows", "top_p", "top_k", "min_p"]
    parameter: float
    log_probs: Array


def drawn_from(readings: Readings, temperature: float) -> Reading:
    """The candidate under which the tokens are likeliest, by a margin; else the one asked for."""
    asked, *others = candidates(readings, temperature)
    best = max(others, key=lambda candidate: candidate.log_probs.sum())
    if best.log_probs.sum() - asked.log_probs.sum() <= EVIDENCE_NATS or _near(best, temperature):
        return asked
    return best


def reported_of(readings: Readings, log_probs: Array, temperature: float, tolerance: float) -> Reading:
    """The candidate that is nearest to reported log-probs, clearly; else the one asked for.

    Args:
        readings: of the tokens.
        log_probs: `[tokens]`, as reported.
        temperature: asked for.
        tolerance: mean difference that rounding makes, in nats.
    """
    asked, *others = candidates(readings, temperature)
    others.append(Reading("all_rows", temperature, readings.over_all_rows))
    others.append(Reading("temperature", 1.0, readings.unscaled))
    best = min(others, key=lambda candidate: gap(candidate.log_probs, log_probs))
    clear = explains(gap(best.log_probs, log_probs), gap(asked.log_probs, log_probs), tolerance)
    return best if clear else asked


def candidates(readings: Readings, temperature: float) -> list[Reading]:
    """The distribution asked for, then the others."""
    asked = readings.scaled[:, FACTORS.index(1.0)]

    def cut(inside: np.ndarray, kept: Array) -> Array:
        return np.where(inside, asked - np.log(kept), -np.inf)

    return [
        Reading("asked", temperature, asked),
        *(
            Reading("temperature", temperature * factor, readings.scaled[:, i])
            for i, factor in enumerate(FACTORS)
            if factor != 1.0
        ),
        *(
            Reading("top_p", p, cut(readings.above < above_with(p), readings.kept_by_p[:, i]))
            for i, p in enumerate(TOP_P)
        ),
        *(Reading("top_k", k, cut(readings.rank < k, readings.kept_by_k[:, i])) for i, k in enumerate(TOP_K)),
        *(
            Reading("min_p", p, cut(readings.share > share_with(p), readings.kept_by_min_p[:, i]))
            for i, p in enumerate(MIN_P)
        ),
    ]


def gap(expected: Array, found: Array) -> float:
    """Mean absolute difference, in nats."""
    return float(np.abs(expected - found).mean())


def explains(remaining: float, whole: float, tolerance: float) -> bool:
    """Whether what remains of a difference is clearly less than the whole, which is more than rounding."""
    return whole > tolerance and remaining < REMAINS * whole


def _near(reading: Reading, temperature: float) -> bool:
    ratio = reading.parameter / temperature
    return reading.kind == "temperature" and 1 / TEMPERATURE_STEP <= ratio <= TEMPERATURE_STEP
