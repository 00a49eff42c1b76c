"""HPT (Towards a Unified View of LLM Post-Training, arXiv 2509.04419): each problem by RL or by its solution.

    L = mean over problems of  α L_RL + β L_SFT,     (α, β) = (1, 0) if P > γ, else (0, β)      (section 4)
    L_RL  = −1/(G L_max) Σ_i Σ_t min(w A_i, clip(w) A_i),   A_i = r_i − mean r          (as Dr. GRPO)
    L_SFT = −1/|τ*| Σ_t log π(τ*_t),     τ* the solution that the problem's row has

P is the share of the G responses that are right. After the abstract, public descriptions and the authors'
code (TsinghuaC3I/Unify-Post-Training), whose gates are 0 and 2 of 8, and whose coefficients are 1 and 0.3.
Ours: the mean over problems, where the code takes that over all tokens of solutions; the clip, which the code
leaves out. A problem without a solution learns by RL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from pydantic import Field

from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import centred
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.guided import chosen_of, rewards_of, success_rate, text_of
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.likelihood import Likelihood
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import BelowOne, PositiveFloat


class HPT(Method):
    """Dr. GRPO on problems that the policy solves often enough, supervised learning on the others."""

    class Options(Clipping):
        """HPT (arXiv 2509.04419)."""

        method: str = "hpt"
        gate: BelowOne = Field(
            0.0, description="γ: problems of at most this success rate learn their solution."
        )
        sft_coefficient: PositiveFloat = Field(1.0, description="β: of the solutions' likelihood.")
        solution_field: str = Field("solution", description="Column of problems that has a worked solution.")

    options: Options

    @property
    def columns(self) -> Sequence[str]:
        return [self.options.solution_field]

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """G responses; then the solution, where too few of them are right."""
        return [self._wanted(group) for group in groups]

    def _wanted(self, group: Group) -> Sequence[Guide]:
        if not group.episodes:
            return [PLAIN] * self.configured.responses_per_prompt
        solution = text_of(group.problem, self.options.solution_field)
        if solution is None or group.episodes[-1].guide != PLAIN or success_rate(group) > self.options.gate:
            return []
        return [Guide(response=solution, name="solution")]

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        """The solution, where there is one; else the responses."""
        self._prompts = self.options.minibatch_prompts or len(groups)
        taught = [any(one.guide != PLAIN for one in group.episodes) for group in groups]
        by_rl = [[not flag] * len(group.episodes) for flag, group in zip(taught, groups, strict=True)]
        by_rl = chosen_of(super().choose, groups, by_rl)
        return [
            [(one.guide != PLAIN) if flag else chosen for one, chosen in zip(g.episodes, own, strict=True)]
            for flag, g, own in zip(taught, groups, by_rl, strict=True)
        ]

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return centred(rewards_of(groups, [[one.guide == PLAIN for one in g.episodes] for g in groups]))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        """1/|τ*| in units of `aggregate`'s weight."""
        unit = self.configured.responses_per_prompt * self.configured.max_response_tokens
        return {
            "learnt": [
                [0.0 if one.guide == PLAIN else unit / one.episode.trained_tokens for one in group.episodes]
                for group in groups
            ]
        }

    def aggregate(self, response_tokens: Sequence[int]) -> npt.NDArray[np.float64]:
        responses = self._prompts * self.configured.responses_per_prompt
        return np.full(len(response_tokens), 1.0 / (responses * self.configured.max_response_tokens))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate()), (self.options.sft_coefficient, Likelihood("learnt"))]
