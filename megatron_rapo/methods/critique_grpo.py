"""Critique-GRPO (arXiv 2506.03106): responses, and what the policy makes of critiques of them, are learnt.

    J = E[ 1/(n + k) ( Σ_i Σ_t w_it A_i + Σ_j Σ_t f(π(y'_jt | q, y'_<t)) A'_j ) ],      f(x) = x / (x + γ)
    A = r − mean r over the n responses and the k refinements alike

y' is sampled under question, response and critique, and learnt under the question alone. After the abstract,
public descriptions and the authors' code (zhangxy-2019/critique-GRPO): the words of prompt and critique, one
refinement of each response, k = 1 of them, a right one if there is one, no clip, no deviation, no divergence,
γ = 0.1. Ours: critiques by rule alone, with the gold answer (the code's `simple_gt`) or without it
(`simple`); the sum over tokens is divided by the longest response, as in Dr. GRPO; of several right
refinements the first counts. A response that could not be judged is not refined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from megatron_rapo.episode.brief import BriefEpisode
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods import options as common
from megatron_rapo.methods.advantages import centred
from megatron_rapo.methods.guided import chosen_of, filled, off_policy_marks, own, rewards_of, solved
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.mixed_gradient import MixedGradient
from megatron_rapo.methods.terms.policy_gradient import PolicyGradient
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import PositiveFloat, PositiveInt


class CritiqueGRPO(Method):
    """Policy gradient of responses, and of refinements that were sampled under a critique of them."""

    class Options(common.Options):
        """Critique-GRPO (arXiv 2506.03106)."""

        method: str = "critique_grpo"
        critique: Literal["simple_gt", "simple"] = Field(
            "simple_gt", description="`simple_gt`: right or wrong, and the gold answer; `simple`: without it."
        )
        refinements: PositiveInt = Field(1, description="k: refinements of a group that are learnt.")
        shaping: PositiveFloat = Field(0.1, description="γ in f(x) = x / (x + γ).")
        refine_prompt: str = Field(
            "Given the following inputs:\n**Question**: {question}\n**Previous Solution**: {solution}\n"
            "**Critique**: {critique}\n\nPlease re-answer by:\n- Correcting potential errors identified in "
            "the critique, if they exist.\n- Providing clear, step-by-step reasoning.\n- Formatting the "
            "final answer as `\\boxed{answer}`.\n\nEnsure the revised solution addresses all issues raised "
            "in the critique.",
            description="Asks for a refinement, by `{question}`, `{solution}` and `{critique}`.",
        )

    options: Options
    aggregation = "constant"
    reads_responses = True

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """n responses; then a refinement of each."""
        count = self.configured.responses_per_prompt
        return [
            [PLAIN] * count
            if not group.episodes
            else [self._refined(group, one) for one in own(group) if one.reward is not None]
            if group.episodes[-1].guide == PLAIN
            else []
            for group in groups
        ]

    def _refined(self, group: Group, scored: ScoredEpisode) -> Guide:
        gold = f", the ground truth is {group.problem.answer}" if self.options.critique == "simple_gt" else ""
        critique = f"The generated solution is {'correct' if solved(scored) else 'incorrect'}{gold}."
        assert not isinstance(scored.episode, BriefEpisode)
        texts = {"question": group.problem.question, "solution": scored.episode.answer, "critique": critique}
        return Guide(question=filled(self.options.refine_prompt, **texts), name="refinement")

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        """The responses, and k refinements."""
        return chosen_of(super().choose, groups, map(self._learnt, groups))

    def _learnt(self, group: Group) -> list[bool]:
        known = [n for n, one in enumerate(group.episodes) if one.guide != PLAIN and one.reward is not None]
        ranked = sorted(known, key=lambda place: not solved(group.episodes[place]))  # stable
        return [
            one.guide == PLAIN or place in ranked[: self.options.refinements]
            for place, one in enumerate(group.episodes)
        ]

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return centred(rewards_of(groups, list(map(self._learnt, groups))))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        return {"off_policy": off_policy_marks(groups)}

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, MixedGradient(PolicyGradient(1.0, math.inf), self.options.shaping))]
