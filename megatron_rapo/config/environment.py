"""The options of the environment that episodes run in."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from megatron_rapo.section import PositiveInt, Seconds, Section


class EnvironmentOptions(Section):
    """What happens between a problem and its reward. The default is one prompt, one response."""

    use: str = Field(
        "single_turn",
        description="`single_turn`, `tool_use`, `conversation`, `countdown_turns`, `program`, `verifiers`, "
        "or a class of your own as `module:Name` (docs/environments.md).",
    )
    tools: list[str] = Field(
        [],
        description="What the policy may call under `tool_use`: `python`, `calculator`, and functions of "
        "your own as `module:name`. Chat templates describe them in the prompts.",
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

    @property
    def may_score(self) -> bool:
        """Whether episodes can have the environment's own score, in place of the configured reward."""
        return self.use not in ("single_turn", "tool_use")

    @property
    def scores_all(self) -> bool:
        """Whether all episodes have the environment's own score, so that no gold answer is read."""
        return self.use == "verifiers"

    def without_effect(self) -> dict[str, str]:
        inert = {} if self.use == "tool_use" else {"tools": 'use is not "tool_use"'}
        if self.use == "single_turn":
            inert |= dict.fromkeys(("options", "max_turns", "time_limit_s"), 'use is "single_turn"')
        return inert

    @model_validator(mode="after")
    def _needs_tools(self) -> EnvironmentOptions:
        if self.use == "tool_use" and not self.tools:
            raise ValueError('tools is empty, and use = "tool_use" calls them; name some, or set another use')
        return self
