"""C-GRPO (Citation-aware GRPO, arXiv 2601.06021): right answers earn more for rubrics fulfilled.

    r = (1 − α) r_outcome + α r_outcome · r_rubric / max over the group of r_rubric

on GRPO's advantages. r_rubric, the share of a problem's rubrics that a response fulfils, counts for right
answers only, so that rubrics cannot be earned without the answer. After the abstract and public
descriptions (github.com/THUDM/CaRR). Ours: who judges rubrics, a reward function that tells the share as a
fact; and α.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.facts import known_facts
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import Fraction


class CGRPO(Method):
    """The outcome's reward is mixed with the share of rubrics fulfilled, for right answers only."""

    reward_range = (0.0, np.inf)

    class Options(Clipping):
        """C-GRPO (arXiv 2601.06021)."""

        method: str = "c_grpo"
        rubric_fact: str = Field(
            "rubrics", description="The fact that tells the share of rubrics that a response fulfils."
        )
        rubric_weight: Fraction = Field(0.3, description="α: of the rubrics in the reward.")

    options: Options

    @property
    def facts(self) -> Sequence[str]:
        return (self.options.rubric_fact,)

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        outcome, weight = known_rewards(groups), self.options.rubric_weight
        rubric = known_facts(groups, self.options.rubric_fact, "algorithm.rubric_fact")
        most = np.ma.filled(rubric.max(axis=1, keepdims=True), 0.0)
        share = rubric / np.where(most > 0.0, most, 1.0)
        return standardised((1.0 - weight) * outcome + weight * outcome * share)

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
