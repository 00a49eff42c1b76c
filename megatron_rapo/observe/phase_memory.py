"""The most memory of a rank in each phase of a step, and since the start."""

from __future__ import annotations

from collections.abc import Callable

PHASES = ("rollout", "annotate", "update", "publish", "checkpoint")  # those that are told


class PhaseMemory:
    """Hears of each change of phase, and asks then how much was held at most since the last one.

    Attributes:
        most: bytes, of any phase and between them, since the start.
    """

    def __init__(self, take_peak: Callable[[], int | None]) -> None:
        """`take_peak` tells the most bytes since it was last asked; None where that cannot be told."""
        self._take_peak = take_peak
        self._phase = ""
        self._peaks = dict.fromkeys(PHASES, 0)
        self.most = 0

    def enter(self, _step: int, phase: str) -> None:
        """The rank enters `phase`, as `observe.phases` names it; a phase inside another counts in both."""
        peak = self._take_peak() or 0
        self.most = max(self.most, peak)
        outer = self._phase.partition("/")[0]
        if outer in self._peaks:
            self._peaks[outer] = max(self._peaks[outer], peak)
        self._phase = phase

    def take(self) -> list[int]:
        """Bytes of each of `PHASES` since the last time; 0 of one that was not entered, or is not known."""
        taken = list(self._peaks.values())
        self._peaks = dict.fromkeys(PHASES, 0)
        return taken
