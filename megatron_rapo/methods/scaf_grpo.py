"""Scaf-GRPO (Scaffolded GRPO, arXiv 2510.19807): where all failed, the weakest hint that helps.

    G' = G                        if a response is right, or in the first steps (exemption)
    G' = G \\ {o_j} ∪ {o_h}       else: o_h ~ π(· | q + h) the right response under the weakest hint h of
                                  knowledge < planning < solution, each told in parts, the first ¼, ½, … of it
    A_i = (r_i − mean r) / std r  over G',    J = GRPO's over G', with o_h under q + h: on-policy

Hints are columns of the problem. After the abstract, public descriptions and the authors' code
(dvlab-research/Scaf-GRPO), which asks for all twelve hints at once and has no divergence. Ours: parts are
shares of a hint's characters; the exemption is counted in steps (the paper's is the first 15% of a run); o_j
is the last response. Where no hint helps, or the problem has none, the group stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.guided import all_failed, beginning, chosen_of, rewards_of, solved, text_of
from megatron_rapo.methods.method import OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.section import NonNegativeFloat, NonNegativeInt, PositiveInt


class ScafGRPO(GRPO):
    """GRPO, with one hinted response in groups that fail without."""

    class Options(GRPO.Options):
        """Scaf-GRPO (arXiv 2510.19807)."""

        method: str = "scaf_grpo"
        divergence_coefficient: NonNegativeFloat = Field(
            0.0, description="Of a divergence from the reference; 0: none, and no reference is loaded."
        )
        hint_fields: list[str] = Field(
            ["hint_knowledge", "hint_planning", "hint_solution"],
            min_length=1,
            description="Columns of problems that have hints, the weakest first.",
        )
        hint_parts: PositiveInt = Field(4, description="Parts in which each hint is told.")
        hint_prompt: str = Field("\nHint: ", description="Stands between question and hint.")
        exemption_steps: NonNegativeInt = Field(0, description="Steps of a run before hints are told.")

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self._steps = 0

    @property
    def columns(self) -> Sequence[str]:
        return self.options.hint_fields

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """G responses; where all fail, one under each part of each hint."""
        return [self._wanted(group) for group in groups]

    def _wanted(self, group: Group) -> Sequence[Guide]:
        o = self.options
        if not group.episodes:
            return [PLAIN] * self.configured.responses_per_prompt
        if self._steps < o.exemption_steps or group.episodes[-1].guide != PLAIN or not all_failed(group):
            return []
        hints = [(name, text_of(group.problem, name)) for name in o.hint_fields]
        return [
            Guide(
                question=group.problem.question + o.hint_prompt + beginning(hint, part / o.hint_parts),
                keeps_prompt=True,
                name=f"{name} {part}/{o.hint_parts}",
            )
            for name, hint in hints
            if hint is not None
            for part in range(1, o.hint_parts + 1)
        ]

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        return chosen_of(super().choose, groups, map(_scaffolded, groups))

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        self._steps += 1
        return standardised(rewards_of(groups, list(map(_scaffolded, groups))))

    def state(self) -> Any:
        return {"steps": self._steps}

    def restore(self, state: Any) -> None:
        self._steps = state["steps"]


def _scaffolded(group: Group) -> list[bool]:
    """Which episodes G' has."""
    flags = [one.guide == PLAIN for one in group.episodes]
    helped = [place for place, one in enumerate(group.episodes) if one.guide != PLAIN and solved(one)]
    if helped:
        flags[sum(flags) - 1], flags[helped[0]] = False, True
    return flags
