"""The findings of all engines as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from megatron_rapo.doctor.finding import Finding

WIDTH = 110


def table(findings: Sequence[Finding]) -> str:
    """A row a hypothesis, of the engine where it holds or else the first; then what to do."""
    causes = list(dict.fromkeys(finding.cause for finding in findings))
    rows = [_telling(f for f in findings if f.cause == cause) for cause in causes]
    engines = len({finding.url for finding in findings})
    left = max(map(len, causes)) + 2
    middle = left + len("not judged") + 2
    lines = []
    for row in rows:
        where = f"{row.url}: " if engines > 1 else ""
        first = row.cause.ljust(left) + row.verdict.ljust(middle - left)
        lines += textwrap.wrap(
            where + row.evidence, WIDTH, initial_indent=first, subsequent_indent=" " * middle
        )
    found = [row for row in rows if row.verdict == "FOUND"]
    if not found:
        verdict = "nothing found" if all(row.verdict == "ok" for row in rows) else "not all could be judged"
        return "\n".join([*lines, "", verdict])
    for row in found:
        concerned = [f.url for f in findings if f.cause == row.cause and f.verdict == "FOUND"]
        lines += ["", f"{row.cause}: {', '.join(concerned)}"]
        lines += textwrap.wrap(row.remedy, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


def _telling(findings: Iterable[Finding]) -> Finding:
    return min(findings, key=lambda finding: ("FOUND", "not judged", "ok").index(finding.verdict))
