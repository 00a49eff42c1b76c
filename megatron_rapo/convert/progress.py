"""How far a conversion is."""

from __future__ import annotations

import sys
import time


class Progress:
    """Says on stderr how much has been written: every second, and at the end."""

    EVERY_S = 1.0

    def __init__(self, total_bytes: int) -> None:
        self.total = total_bytes
        self._done = 0
        self._start = self._said = time.monotonic()

    def add(self, written: int) -> None:
        """Counts `written` bytes more."""
        self._done += written
        now = time.monotonic()
        if now - self._said >= self.EVERY_S or self._done == self.total:
            self._said = now
            unit, name = (2**30, "GiB") if self.total >= 2**30 else (2**20, "MiB")
            done, total = self._done / unit, self.total / unit
            print(f"{done:.1f} of {total:.1f} {name} · {now - self._start:.0f} s", file=sys.stderr)
