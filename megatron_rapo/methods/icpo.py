"""ICPO (In-Context Steered Policy Optimization, arXiv 2510.26519): some responses are shown examples.

    J = E[ 1/N ( Σ_on 1/|o| Σ_t min(w A, clip(w) A) + Σ_off 1/|o| Σ_t f(x_t) A ) ],      f(x) = x / (x + λ)
    x_t = π(o_t | q, o_<t) / π_old(o_t | D, q, o_<t)              o ~ π_old(· | D, q), D worked examples
    off-policy responses count where they are right (expert region), and earn r + α max(0, 1 − t/T) at step t

A as in GRPO, over those that count. The policy with examples is its own expert (implicit expert forcing), and
learns to do without them. After the abstract and public descriptions. Ours: examples stand in the
configuration, in front of the question; the ratio of where the paper's shaping is LUFFY's; all of
λ, α and T; no divergence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.guided import chosen_of, off_policy_marks, rewards_of, solved
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.mixed_gradient import MixedGradient
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import NonNegativeFloat, PositiveFloat, PositiveInt


class ICPO(Method):
    """Clipped policy gradient, and a shaped one of responses that were sampled behind worked examples."""

    class Options(Clipping):
        """ICPO (arXiv 2510.26519)."""

        method: str = "icpo"
        examples: str = Field(
            "What is 12 + 30?\n12 + 30 = 42. The answer is \\boxed{42}.\n\n",
            min_length=1,
            description="D: worked examples, as they stand in front of the question.",
        )
        guided_responses: PositiveInt = Field(1, description="Of the responses to a prompt, behind examples.")
        shaping: PositiveFloat = Field(0.01, description="λ in f(x) = x / (x + λ).")
        bonus: NonNegativeFloat = Field(0.1, description="α: of right responses behind examples, at first.")
        bonus_steps: PositiveInt = Field(100, description="T: steps over which the bonus falls to 0.")

    options: Options
    aggregation = "sequence_mean"

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        if options.guided_responses >= configured.responses_per_prompt:
            raise ValueError(
                f"guided_responses = {options.guided_responses} leaves none of rollout.responses_per_prompt "
                f"= {configured.responses_per_prompt} to the policy alone; lower it"
            )
        self._steps = 0

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """N − 1 responses to the prompt, and one behind examples."""
        o, count = self.options, self.configured.responses_per_prompt

        def wanted(group: Group) -> list[Guide]:
            steered = Guide(question=o.examples + group.problem.question, name="behind examples")
            return [PLAIN] * (count - o.guided_responses) + [steered] * o.guided_responses

        return [[] if group.episodes else wanted(group) for group in groups]

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        return chosen_of(super().choose, groups, _in_region(groups))

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        bonus = self.options.bonus * max(0.0, 1.0 - self._steps / self.options.bonus_steps)
        self._steps += 1
        shaped = rewards_of(groups, _in_region(groups))
        for row, marks in zip(shaped, off_policy_marks(groups), strict=True):
            row[: len(marks)] += bonus * np.array(marks)
        return standardised(shaped)

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        return {"off_policy": off_policy_marks(groups)}

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, MixedGradient(self.options.surrogate(), self.options.shaping, over_engine=True))]

    def state(self) -> Any:
        return {"steps": self._steps}

    def restore(self, state: Any) -> None:
        self._steps = state["steps"]


def _in_region(groups: Sequence[Group]) -> list[list[bool]]:
    """Of what was sampled behind examples, what is right; and all else."""
    return [[not one.guide.is_off_policy or solved(one) for one in group.episodes] for group in groups]
