"""The phases of a step: how long each takes on this rank, and which one it is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# Called with (step, phase) at each change.
Listener = Callable[[int, str], None]

BETWEEN = "between phases"


class Phases:
    """Times phases by a clock, the host's by default: work queued on a GPU counts where the host waits."""

    def __init__(self, listeners: Sequence[Listener], clock: Callable[[], float] = time.perf_counter) -> None:
        self.step = 0
        self._clock = clock
        self._listeners = list(listeners)
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._began = clock()

    def listen(self, listener: Listener) -> None:
        """Tells one more listener from now on."""
        self._listeners.append(listener)

    def begin_step(self, step: int) -> None:
        """Starts to time a step from zero."""
        self.step = step
        self._seconds.clear()
        self._began = self._clock()
        self._tell()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the step; one inside another is named `outer/name` and counts in both."""
        self._open.append(name)
        path = "/".join(self._open)
        self._tell()
        began = self._clock()
        try:
            yield
        finally:
            self._open.pop()
            self._seconds[path] = self._seconds.get(path, 0.0) + self._clock() - began
        self._tell()  # Not after an error: the heartbeat keeps the phase that failed.

    def times(self) -> dict[str, float]:
        """Seconds of the step so far: `time/<phase>_s`, a repeated phase summed, and `time/step_s`."""
        times = {f"time/{path}_s": seconds for path, seconds in self._seconds.items()}
        return {**times, "time/step_s": self._clock() - self._began}

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(self.step, "/".join(self._open) or BETWEEN)
