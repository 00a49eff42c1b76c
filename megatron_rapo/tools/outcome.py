"""What a call can come to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class CallOutcome(StrEnum):
    """Each is counted by its name, and but for a result the policy is told what was wrong."""

    RESULT = "result"
    MALFORMED = "malformed"  # what the policy wrote is no call in its family's format
    UNKNOWN_TOOL = "unknown_tool"
    BAD_ARGUMENTS = "bad_arguments"
    RAISED = "raised"
    BAD_RESULT = "bad_result"  # None, bytes, or what else is no text and no JSON
    TIMEOUT = "timeout"  # of the wall clock, or of the CPU where that is limited
    OUT_OF_MEMORY = "out_of_memory"
    DIED = "died"  # its process ended, or said what is no reply
    TOO_MANY_CALLS = "too_many_calls"


@dataclass(frozen=True)
class Reply:
    """What a process made of one call.

    Attributes:
        value: of a result: what the function returned, as JSON has it.
        why: else: what happened, in a sentence's words.
        cut: whether a text was longer than the limit.
    """

    outcome: CallOutcome
    value: Any = None
    why: str = ""
    cut: bool = False
