"""What a reward function returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Score:
    """The reward of one response.

    Attributes:
        value: any finite number; 1 is a right answer, 0 a wrong one. None: unknown, which is counted and not
            trained on.
        facts: named numbers that are logged beside it, as the mean of `reward/<name>`.
        answer: the final answer as the function read it, for people and for majority votes.
    """

    value: float | None
    facts: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None
