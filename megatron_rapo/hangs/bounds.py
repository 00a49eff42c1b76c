"""How long a phase may take before it counts as a hang: by how long it took so far."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping

REMEMBERED = 32  # newest stays in a phase; one slow start does not count for ever


class Bounds:
    """A bound for each phase, in seconds: `factor` times its longest stay of late, and at least `least_s`.

    Args:
        factor: times the longest stay.
        least_s: of every bound.
        unmeasured_s: of a phase that was not seen before.
        patience_s: by the first part of a phase's name: how long what it waits for may be silent, by limits
            of its own. What waits for something longer than it is given up is no hang.
    """

    def __init__(
        self, factor: float, least_s: float, unmeasured_s: float, patience_s: Mapping[str, float]
    ) -> None:
        self._factor = factor
        self._least_s = least_s
        self._unmeasured_s = unmeasured_s
        self._patience_s = patience_s
        self._stays: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def note(self, phase: str, seconds: float) -> None:
        """A stay in `phase` took so long, and ended."""
        self._stays[phase].append(seconds)

    def of(self, phase: str) -> float:
        """Seconds after which a stay in `phase` is a hang."""
        stays = self._stays.get(phase)
        measured = self._factor * max(stays) if stays else self._unmeasured_s
        patience = self._patience_s.get(phase.partition("/")[0], 0.0)
        return max(measured, self._least_s, patience + self._least_s if patience else 0.0)

    def why(self, phase: str) -> str:
        """What the bound follows from, for people."""
        stays = self._stays.get(phase)
        if not stays:
            return "the first time in this phase: parallel.timeout_s"
        return f"its longest stay so far was {max(stays):.1f} s; observe.hang_factor, observe.hang_least_s"
