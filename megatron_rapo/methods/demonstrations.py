"""Texts that the data give, to be learnt from in place of responses that engines sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from megatron_rapo.methods.options import Options
from megatron_rapo.section import NonNegativeInt, PositiveInt

Turns = Literal["all", "last"]


@dataclass(frozen=True)
class Demonstrations:
    """Which texts of the data a method learns from.

    Attributes:
        column: of a problem, that has the text; None: the assistant's turns of messages, else the answer.
        turns: of messages, which of the assistant's turns are learnt.
        held_out: texts of each source that are not learnt, but measured.
        held_out_every: steps between these measurements; None: at first and at last alone.
    """

    column: str | None
    turns: Turns
    held_out: int = 0
    held_out_every: int | None = None


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

    held_out: NonNegativeInt = Field(
        0,
        description="The last so many texts of each source are not learnt: `evaluate/loss` is the policy's "
        "loss on them, before the first step, after the last, and every `held_out_every` steps.",
    )
    held_out_every: PositiveInt | None = Field(
        None, description="See `held_out`. Default: at first and at last alone."
    )

    def without_effect(self) -> dict[str, str]:
        inert = super().without_effect()
        return inert if self.held_out else inert | {"held_out_every": "held_out is 0"}

    @property
    def demonstrations(self) -> Demonstrations:
        """What these options say."""
        return Demonstrations(self.solution, self.turns, self.held_out, self.held_out_every)
