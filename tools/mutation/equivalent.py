"""Faults that change nothing that could be noticed, each with the reason: tests/equivalent_faults.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from mutation.faults import Fault

FILE = Path("tests/equivalent_faults.toml")


@dataclass(frozen=True)
class Equivalent:
    """A fault by its content: the line's text, and what becomes what in it. Other lines may come and go."""

    file: str
    line: str
    before: str
    after: str
    why: str

    def is_it(self, fault: Fault) -> bool:
        """Whether it speaks of this fault."""
        told = (self.file, self.line, self.before, self.after)
        return told == (fault.file, fault.text, fault.before, fault.after)


def read_equivalents(root: Path) -> list[Equivalent]:
    """All that are declared."""
    raw = tomllib.loads((root / FILE).read_text())
    return [Equivalent(**entry) for entry in raw.get("fault", [])]
