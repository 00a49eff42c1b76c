"""What a verification can come to, and what it earns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Outcome(StrEnum):
    """The result of verifying one response.

    A verification that timed out or crashed says nothing about the response: its reward is unknown, which is
    counted apart, and not trained on as if it were wrong.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    TIMEOUT = "timeout"
    CRASH = "crash"

    @property
    def known(self) -> bool:
        """Whether the verification came to its end, so that there is a reward."""
        return self in (Outcome.CORRECT, Outcome.WRONG)


@dataclass(frozen=True)
class Verification:
    """One judged response. Its texts can be written as UTF-8, whatever a user's own code said.

    Attributes:
        extracted: its final answer as the verifier read it; None where it found none, or did not finish.
        why: of a timeout or crash, what happened, in a sentence's words; else None.
        reward: any finite number; None where it is unknown. Default: what the outcome earns.
        facts: named numbers that are logged as the mean of `reward/<name>`.
        trace: of a crash, the traceback in the function's own code; else None.
    """

    outcome: Outcome
    extracted: str | None = None
    why: str | None = None
    reward: float | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    trace: str | None = None

    def __post_init__(self) -> None:
        if self.reward is None:
            object.__setattr__(self, "reward", reward_of(self.outcome))
        for name in ("extracted", "why", "trace"):
            if (text := getattr(self, name)) is not None:
                object.__setattr__(self, name, encodable(text))


def encodable(text: str) -> str:
    """The text with `?` for halves of surrogate pairs, which are no characters and cannot be stored."""
    return text.encode(errors="replace").decode()


def reward_of(outcome: Outcome) -> float | None:
    """1 for a correct response, 0 for a wrong one; None where it is unknown."""
    return float(outcome is Outcome.CORRECT) if outcome.known else None
