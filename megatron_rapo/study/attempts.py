"""Each start of a run's commands that ended by itself: `attempts/RUN.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.record.lines import read_lines, write_lines

FOLDER = "attempts"


@dataclass(frozen=True)
class Attempt:
    """A start.

    Attributes:
        started: UTC, ISO 8601.
        seconds: until it ended.
        status: exit status of the command that ended it; 0 where all came to their end.
        stopped: whether it was asked to end.
        told: the last lines of its log, where it failed.
    """

    started: str
    seconds: float
    status: int
    stopped: bool
    told: str

    @property
    def failed(self) -> bool:
        """Whether it ended for a reason of its own."""
        return self.status != 0 and not self.stopped


def read_attempts(folder: Path, run: str) -> list[Attempt]:
    """Those of a run, oldest first.

    Raises:
        RapoError: the file is damaged.
    """
    return read_lines(
        _file(folder, run), Attempt, of="attempts", remedy="remove it: the run is then started as a new one"
    )


def add_attempt(folder: Path, run: str, attempt: Attempt) -> None:
    """Adds one."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    write_lines(_file(folder, run), [*read_attempts(folder, run), attempt])


def forget_failures(folder: Path, run: str) -> None:
    """A run that failed for good is started again."""
    if kept := [attempt for attempt in read_attempts(folder, run) if not attempt.failed]:
        write_lines(_file(folder, run), kept)
    else:
        _file(folder, run).unlink(missing_ok=True)


def _file(folder: Path, run: str) -> Path:
    return folder / FOLDER / f"{run}.jsonl"
