"""The phases of a step: how long each takes on this rank, and which one it is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

# Called with (step, phase) at each change.
Listener = Callable[[int, str], None]

BETWEEN = "between phases"


class Phases:
    """Times phases by the host's clock: work queued on a GPU counts where the host waits for it."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.step = 0
        self._listeners = list(listeners)
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def listen(self, listener: Listener) -> None:
        """Tells one more listener from now on."""
        self._listeners.append(listener)

    def begin_step(self, step: int) -> None:
        """Starts to time a step from zero."""
        self.step = step
        self._seconds.clear()
        self._began = time.perf_counter()
        self._tell()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the step; one inside another is named `outer/name` and counts in both."""
        self._open.append(name)
        path = "/".join(self._open)
        self._tell()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._open.pop()
            self._seconds[path] = self._seconds.get(path, 0.0) + time.perf_counter() - began
        self._tell()  # Not after an error: the heartbeat keeps the phase that failed.

    def times(self) -> dict[str, float]:
        """Seconds of the step so far: `time/<phase>_s`, a repeated phase summed, and `time/step_s`."""
        times = {f"time/{path}_s": seconds for path, seconds in self._seconds.items()}
        return {**times, "time/step_s": time.perf_counter() - self._began}

    def _tell(self) -> None:
        for listener in self._listeners:
            listener(self.step, "/".join(self._open) or BETWEEN)
