"""The record of a rank: phases as it enters them, and the requests that it sent.

RUN/timeline/rank_00000.jsonl    [time, step, phase], or [from, to, engine, responses]
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = "timeline"
_MOST_HELD = 256  # lines in memory


@dataclass(frozen=True)
class Entered:
    """A rank enters a phase; times are Unix seconds by its host's clock."""

    at: float
    step: int
    phase: str


@dataclass(frozen=True)
class Asked:
    """A request to an engine, from its sending to its answer, or to the engine's loss."""

    begun: float
    ended: float
    engine: str
    responses: int


class Timeline:
    """Writes one rank's record, some lines at a time. An earlier start's lines stay."""

    def __init__(self, run_directory: Path, rank: int, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._path = run_directory / FOLDER / f"rank_{rank:05d}.jsonl"
        self._lines: list[str] = []

    def enter(self, step: int, phase: str) -> None:
        """The rank enters a phase now."""
        self._add([round(self._clock(), 6), step, phase])

    def request(self, engine: str, begun: float, ended: float, responses: int) -> None:
        """A request has ended. Any thread may tell it; it is written with the next phase."""
        self._lines.append(json.dumps([round(begun, 6), round(ended, 6), engine, responses]))

    def flush(self) -> None:
        """Writes what is held."""
        lines, self._lines = self._lines, []
        if lines:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))

    def _add(self, line: list[object]) -> None:
        self._lines.append(json.dumps(line))
        if len(self._lines) >= _MOST_HELD:
            self.flush()


def read(run_directory: Path) -> Iterator[tuple[int, list[Entered | Asked]]]:
    """Each rank's record, in order. A line that a killed process left half is passed over."""
    for path in sorted((run_directory / FOLDER).glob("rank_*.jsonl")):
        entries: list[Entered | Asked] = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                values = json.loads(line)
                entries.append(Entered(*values) if len(values) == 3 else Asked(*values))
            except (ValueError, TypeError):
                continue
        yield int(path.stem.removeprefix("rank_")), entries
