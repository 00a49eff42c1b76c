"""What became of a hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "FOUND", "not judged"]


@dataclass(frozen=True)
class Finding:
    """A hypothesis about one engine.

    Attributes:
        cause: the hypothesis.
        verdict: FOUND: it holds.
        evidence: the figures that decided.
        remedy: what to do; empty where it does not hold.
        url: of the engine.
    """

    cause: str
    verdict: Verdict
    evidence: str
    remedy: str
    url: str
