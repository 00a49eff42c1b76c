"""The options that all prompt sources share: what one is called, what rewards it, its part of a mixture."""

from __future__ import annotations

from pydantic import Field

from megatron_rapo.config.reward import Judging
from megatron_rapo.section import PositiveFloat, Section

LABEL_MEANS = "letters, digits, dots, hyphens and underscores, a letter or digit first"


class Source(Section):
    """A data set."""

    label: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="What evaluations and metrics call it. Default: the name of the file, function or task.",
    )
    reward: Judging | None = Field(
        None,
        description="What judges responses to its problems, in place of `[reward]`: `verifier`, `function`, "
        "`functions` and `correct_at`.",
    )
    weight: PositiveFloat | None = Field(
        None, description="Of a mixture's source alone: its share of the prompts, relative to the others'."
    )
