"""TAPO (Tool-Augmented Policy Optimization, arXiv 2510.07038): DAPO, with a limit to calls of tools.

    J = E[ 1/Σ|o_i| Σ_i Σ_{t sampled} min(w A_i, clip(w, 1 − ε_low, 1 + ε_high) A_i) ]
    A_i = (r_i − mean r) / std r,   r less the penalty λ for each call beyond the limit M

Tokens that tools gave are in no ratio and no mean: here they never are, under any method. After the
abstract and public descriptions. Ours: the penalty, and its size; the environment may also end an episode
at its own limit (`environment.max_turns`). Truncated episodes are left out of the loss, as in DAPO.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.facts import known_facts
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import NonNegativeFloat, NonNegativeInt


class TAPO(Method):
    """DAPO's clip and filter, with a penalty for each call of a tool beyond a limit."""

    class Options(Clipping):
        """TAPO (arXiv 2510.07038)."""

        method: str = "tapo"
        clip_high: NonNegativeFloat = Field(
            0.28, description="ε_high: the ratio is clipped above at 1 + this."
        )
        mask_truncated: bool = Field(True, description="Leave truncated episodes out of the loss.")
        calls_fact: str = Field("calls", description="The fact that tells how many calls an episode made.")
        call_limit: NonNegativeInt = Field(5, description="M: calls that cost nothing.")
        call_penalty: NonNegativeFloat = Field(0.1, description="λ: of each call beyond, from the reward.")

    options: Options

    @property
    def facts(self) -> Sequence[str]:
        return (self.options.calls_fact,)

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        o = self.options
        calls = known_facts(groups, o.calls_fact, "algorithm.calls_fact")
        return standardised(known_rewards(groups) - o.call_penalty * (calls - o.call_limit).clip(min=0.0))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
