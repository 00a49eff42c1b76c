"""Distillation from a teacher, exact over the vocabulary, on the policy's own responses or on given texts.

    J = E_{y ~ π} [ 1/Σ|y| Σ_t D(τ, π)(y_<t) ]        (GKD, arXiv 2306.13649, eqs. 3 and 4, with λ = 1)
    J = E_{(x, y) ∼ data} [ … ]                       (its λ = 0: `learns_from = "solutions"`)

τ is the teacher. D is the reverse divergence KL(π ‖ τ), which MiniLLM (arXiv 2306.08543) argues for, the
forward one KL(τ ‖ π), or the generalised Jensen–Shannon divergence of GKD (eq. 2),

    D_β = β KL(τ ‖ M) + (1 − β) KL(π ‖ M),   M = β τ + (1 − β) π

As in GKD, gradients pass through D at the sampled prefixes, not through the sampling. With a policy
coefficient above 0, GRPO's clipped surrogate (arXiv 2402.03300) is added, as GKD adds RL, with a group's
advantages.

Ours: teacher and policy have one temperature, that of the rollouts; all tokens count alike (`token_mean`);
the reverse divergence is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.aggregation import Aggregation
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.demonstrations import Demonstrations, Taught
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.distillation import Distillation, TeacherDivergence
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import NonNegativeFloat, PositiveFloat


class Distill(Method):
    """A divergence from the teacher (`[teacher]`); where asked for, beside a clipped policy gradient."""

    class Options(Clipping, Taught):
        """Distillation from a teacher (arXiv 2306.13649)."""

        method: str = "distill"
        learns_from: Literal["samples", "solutions"] = Field(
            "samples",
            description="`samples`: the policy's own responses (on-policy distillation); `solutions`: texts "
            "that the data give, so that nothing is sampled.",
        )
        divergence: TeacherDivergence = Field(
            "reverse",
            description="From the teacher τ, exact over the vocabulary. `reverse`: KL(π ‖ τ), which seeks "
            "its modes; `forward`: KL(τ ‖ π), which covers them; `jensen_shannon`: between both.",
        )
        mixture: float = Field(
            0.5,
            gt=0,
            lt=1,
            description="β, the teacher's share in the mixture of the Jensen–Shannon divergence; the nearer "
            "to 0, the more it is like the forward one.",
        )
        divergence_coefficient: PositiveFloat = Field(1.0, description="Of the divergence from the teacher.")
        policy_coefficient: NonNegativeFloat = Field(
            0.0,
            description="Of the clipped policy gradient beside it; 0: none, and rewards are measured only.",
        )
        loss_aggregation: Aggregation = Field(
            "token_mean",
            description="`token_mean`: over all response tokens of the minibatch; `sequence_mean`: over each "
            "response's tokens, then over responses; `constant`: sum over tokens divided by responses × "
            "max_response_tokens.",
        )

        def without_effect(self) -> dict[str, str]:
            inert = super().without_effect()
            if self.learns_from == "samples":
                of_texts = ("solution", "turns", "held_out", "held_out_every")
                inert |= dict.fromkeys(of_texts, 'learns_from is "samples"')
            else:
                of_samples = ("policy_coefficient", "mask_truncated", "groups_without_variance")
                inert |= dict.fromkeys(of_samples, 'learns_from = "solutions" samples nothing')
            if self.divergence != "jensen_shannon":
                inert["mixture"] = f'divergence is "{self.divergence}"'
            if self.policy_coefficient == 0:
                clips = ["clip_low", "clip_high", "clip_dual"]
                inert |= dict.fromkeys(clips, "policy_coefficient is 0")
            return inert

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self.mixture = options.mixture

    @property
    def demonstrations(self) -> Demonstrations | None:
        return self.options.demonstrations if self.options.learns_from == "solutions" else None

    @property
    def aggregation(self) -> Aggregation:  # type: ignore[override]
        return self.options.loss_aggregation

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        terms: list[tuple[float, Term]] = [(o.divergence_coefficient, Distillation(o.divergence))]
        if o.policy_coefficient:
            terms.append((o.policy_coefficient, o.surrogate()))
        return terms
