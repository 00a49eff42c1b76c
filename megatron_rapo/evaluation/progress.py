"""How far an evaluation is, in a line now and then."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.evaluation.store import StoredSample

EVERY_S = 10.0


class SampleProgress:
    """Counts samples as they are stored, and prints outcomes, speed and the time left.

    Args:
        total: samples of the whole evaluation.
        present: those that were on disk when it began: they cost no time.
    """

    def __init__(self, total: int, present: int) -> None:
        self._total = total
        self._present = present
        self._done = 0
        self._tokens = 0
        self._outcomes: Counter[Outcome] = Counter()
        self._began = self._told = time.monotonic()

    def add(self, samples: Sequence[StoredSample], what: str) -> None:
        """These are on disk now; tells so if it is time to."""
        self._done += len(samples)
        self._tokens += sum(sample.length for sample in samples)
        self._outcomes.update(sample.outcome for sample in samples)
        now = time.monotonic()
        if now - self._told >= EVERY_S:
            self._told = now
            print(f"{what} · {self.line()}", file=sys.stderr, flush=True)

    def line(self) -> str:
        """What is known now, on one line."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        left = (self._total - self._present - self._done) * elapsed / max(self._done, 1)
        outcomes = ", ".join(
            f"{outcome} {self._outcomes[outcome] / max(self._done, 1):.1%}"
            for outcome in Outcome
            if self._outcomes[outcome]
        )
        return (
            f"{self._present + self._done:,}/{self._total:,} samples · {outcomes} · "
            f"{self._tokens / elapsed:,.0f} tok/s · elapsed {timedelta(seconds=round(elapsed))} · "
            f"left {timedelta(seconds=round(left))}"
        )
