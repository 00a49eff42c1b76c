"""What was found of one thing that runs need, and all findings as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH = 110

Verdict = Literal["ok", "absent", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        verdict: `absent` costs a feature; `wrong` is to be mended before a run.
        found: what there is.
        remedy: what it costs, and how to get it; empty where it is there.
    """

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """A row a thing, and beneath it what it costs and how to get it; at the end, whether runs can be made."""
    left = max(len(one.name) for one in findings) + 2
    middle = left + len("absent") + 2
    for one in findings:
        first = one.name.ljust(left) + one.verdict.ljust(middle - left)
        yield from textwrap.wrap(one.found, WIDTH, initial_indent=first, subsequent_indent=" " * middle)
        indent = " " * middle
        yield from textwrap.wrap(one.remedy, WIDTH, initial_indent=indent, subsequent_indent=indent)
    wrong = [one.name for one in findings if one.verdict == "wrong"]
    yield ""
    yield f"to be mended: {', '.join(wrong)}" if wrong else "nothing is to be mended"
