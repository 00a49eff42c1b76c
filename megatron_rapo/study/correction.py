"""Several contrasts at once: Holm's correction, and intervals that hold together."""

from __future__ import annotations

from collections.abc import Sequence

LEVEL = 0.05


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): those of at most 0.05 are told apart with a chance of 5% of any mistake.

    The k-th smallest of m counts (m − k + 1)-fold, and no less than those before it. It holds however the
    contrasts depend on each other; here they share arms and problems.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def together(contrasts: int) -> float:
    """The confidence of each of so many intervals with which all hold in 95 of 100 studies (Bonferroni)."""
    return 1 - LEVEL / contrasts
