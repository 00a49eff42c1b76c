"""The table of docs/engines.md that says what each kind does; the conformance suite holds kinds to it."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/engines.md"
HEADING = "## What each kind does"


def table() -> dict[str, dict[str, str]]:
    """Cells by row and kind."""
    section = PAGE.read_text(encoding="utf-8").split(HEADING, 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    kinds = [kind.strip("`") for kind in head[1:]]
    return {row: dict(zip(kinds, cells, strict=True)) for row, *cells in rows}


def cell(row: str, kind: str) -> str:
    """What the page says of this kind."""
    return table()[row][kind]
