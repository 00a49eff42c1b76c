"""With which software a run was made, from which step on: `versions.jsonl`, a line a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_rapo.record.lines import read_lines, write_lines

FILE = "versions.jsonl"

Versions = Mapping[str, str]


@dataclass(frozen=True)
class Start:
    """A start of a run with software that it had not had before.

    Attributes:
        step: that it went on after; 0 is the beginning.
        started: UTC, ISO 8601.
    """

    step: int
    started: str
    versions: Versions


def record_versions(directory: Path, resume_step: int | None, versions: Versions) -> str:
    """Adds a line to `versions.jsonl` where the versions are not those of the last one.

    Args:
        directory: of the run.
        resume_step: that the run goes on after; None for a new one, whose file is begun anew.
        versions: of now.

    Returns:
        What changed since the last start, for people; empty where nothing did.

    Raises:
        RapoError: the file is damaged.
    """
    before = [] if resume_step is None else read_versions(directory)
    last = before[-1].versions if before else {}
    if last == versions:
        return ""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_lines(directory / FILE, [*before, Start(resume_step or 0, now, versions)])
    if not before:
        return ""
    changed = [
        f"{name} {last.get(name, 'none')} → {versions.get(name, 'none')}"
        for name in dict.fromkeys([*last, *versions])
        if last.get(name) != versions.get(name)
    ]
    return f"going on with other versions: {', '.join(changed)}"


def read_versions(directory: Path) -> list[Start]:
    """The starts that `versions.jsonl` tells, oldest first; none where there is no file.

    Raises:
        RapoError: the file is damaged.
    """
    return read_lines(
        directory / FILE, Start, of="versions", remedy="mend it, or remove it: it is begun anew then"
    )
