"""What guards found and did, a line each: `guards.jsonl` in the run's directory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole, writing_file

FILE = "guards.jsonl"


@dataclass(frozen=True)
class Finding:
    """One.

    Attributes:
        rollbacks: that the run had made before: steps that were rolled back come again, with one more.
        step: in which it was found.
        guard: that found it, as the option is called.
        action: what was done.
        message: for people.
    """

    rollbacks: int
    step: int
    guard: str
    action: str
    message: str


class FindingsLog:
    """The file, as the main rank writes it."""

    def __init__(self, run: Path, rollbacks: int, step: int) -> None:
        """Drops what was found in steps that come again: of one that goes on after `step`.

        Raises:
            RapoError: the file is damaged.
        """
        self._path = run / FILE
        kept = [one for one in read_findings(run) if (one.rollbacks, one.step) <= (rollbacks, step)]
        if self._path.exists():
            write_whole(self._path, "".join(map(_line, kept)))

    def add(self, finding: Finding) -> None:
        """Appends one."""
        with writing_file(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(_line(finding))


def read_findings(run: Path) -> list[Finding]:
    """All of a run, oldest first.

    Raises:
        RapoError: the file is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # The run was killed while it wrote this line.
        try:
            found.append(Finding(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise RapoError(
                f"{path} line {number} is no finding of a guard ({error!r}); remove it"
            ) from error
    return found


def told(findings: Sequence[Finding]) -> list[str]:
    """A line for each guard and what it did, with the first of its messages."""
    counts = Counter((one.guard, one.action) for one in findings)
    first = {(one.guard, one.action): one for one in reversed(findings)}
    return [
        f"{guard}: {_DONE[action]}, {count} {'times' if count > 1 else 'time'}, first in step "
        f"{first[guard, action].step}: {first[guard, action].message}"
        for (guard, action), count in counts.items()
    ]


_DONE = {
    "warn": "warned",
    "skip": "update not applied",
    "roll_back": "rolled back",
    "stop": "run ended",
}


def _line(finding: Finding) -> str:
    return json.dumps(asdict(finding)) + "\n"
