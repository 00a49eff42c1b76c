"""What a verification can come to, and what it earns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """The result of verifying one response.

    A verification that timed out or crashed says nothing about the response, so it is counted apart from
    wrong ones, although all three earn nothing.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    TIMEOUT = "timeout"
    CRASH = "crash"


@dataclass(frozen=True)
class Verification:
    """One verified response.

    Attributes:
        extracted: its final answer as the verifier read it; None where it found none, or did not finish.
        why: of a timeout or crash, what happened, in a sentence's words; else None.
    """

    outcome: Outcome
    extracted: str | None = None
    why: str | None = None


def reward_of(outcome: Outcome) -> float:
    """1 for a correct response, 0 for any other."""
    return 1.0 if outcome is Outcome.CORRECT else 0.0
