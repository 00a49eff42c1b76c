"""The options of the environment that episodes run in."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from megatron_rapo.section import PositiveInt, Seconds, Section


class EnvironmentOptions(Section):
    """What happens between a problem and its reward. The default is one prompt, one response."""

    use: str = Field(
        "single_turn",
        description="`single_turn`, or a class of your own as `module:Name` (docs/environments.md).",
    )
    options: dict[str, Any] = Field(
        {}, description="Options of the environment itself, as its class declares them."
    )
    max_turns: PositiveInt = Field(
        16, description="Calls of `generate` that an episode may make; one more ends the run."
    )
    time_limit_s: Seconds = Field(
        300.0,
        description="Seconds that an episode may take for itself, without what it waits for engines; past it "
        "its reward is unknown (outcome `timeout`).",
    )

    def without_effect(self) -> dict[str, str]:
        if self.use != "single_turn":
            return {}
        return dict.fromkeys(("options", "max_turns", "time_limit_s"), 'use is "single_turn"')
