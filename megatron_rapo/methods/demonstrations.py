"""Texts that the data give, to be learnt from in place of responses that engines sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from megatron_rapo.methods.options import Options

Turns = Literal["all", "last"]


@dataclass(frozen=True)
class Demonstrations:
    """Which texts of the data a method learns from.

    Attributes:
        column: of a problem, that has the text; None: the assistant's turns of messages, else the answer.
        turns: of messages, which of the assistant's turns are learnt.
    """

    column: str | None
    turns: Turns


class Taught(Options):
    """The options of methods that learn from given texts."""

    solution: str | None = Field(
        None,
        description="Column of a problem with the text to learn. Default: of messages what the assistant "
        "says there, else the answer.",
    )
    turns: Turns = Field(
        "all",
        description="Of messages: `all`: learn each turn of the assistant; `last`: the last one alone, as "
        "some chat templates write earlier turns otherwise than they were said.",
    )

    @property
    def demonstrations(self) -> Demonstrations:
        """What these options say."""
        return Demonstrations(self.solution, self.turns)
