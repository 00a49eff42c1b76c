"""RAPO (arXiv 2510.03865): exploration beyond the reference's support.

    J = E[ 1/G Σ_i ( g_i(θ) − α · KL(p_i ‖ π) + β · H(π) ) ]
    p_i = π_ref^φ(r_i) / Z,   φ(r) = φ0 + (1 − φ0) · clip(r, 0, 1),   A_i = (r_i − mean r) / std r

g is the clipped surrogate, and p_i the reference, flattened the more the lower the reward: a failed response
pulls towards exploring, a correct one towards the reference. The KL is the forward one, which covers modes.

Of the paper are the objective and the sampled estimate `forward_printed`. Ours: flattening token by token
over the whole vocabulary, so that Z is exact (docs/architecture.md says why); the form of φ; the exact
divergence; the mean over tokens; the sample's standard deviation (n − 1); and all defaults, as the paper's
are not public.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.aggregation import Aggregation
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.facts import known_facts
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.audit import Audit
from megatron_rapo.methods.terms.divergences import Divergence, FlattenedKind
from megatron_rapo.methods.terms.entropy import Entropy
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import Fraction, NonNegativeFloat


class RAPO(Method):
    """Clipped policy gradient + α · KL(flattened reference ‖ policy) − β · entropy."""

    class Options(Clipping):
        """RAPO (arXiv 2510.03865)."""

        method: str = "rapo"
        divergence: FlattenedKind = Field(
            "forward_exact",
            description="KL(flattened reference ‖ policy). `forward_exact`: over the vocabulary; "
            "`forward_sampled`: its unbiased estimate on the samples; `forward_printed`: the estimate as the "
            "paper prints it, for replication; `reverse_flattened`: KL(policy ‖ flattened reference), exact, "
            "a control of the direction.",
        )
        divergence_coefficient: NonNegativeFloat = Field(
            5e-3, description="α; 0: no divergence, and no reference is loaded."
        )
        flatten_floor: Fraction | None = Field(
            None,
            description="φ0 in φ(r) = φ0 + (1 − φ0) · clip(r, 0, 1), the power that flattens the reference "
            "for a response with reward r; 1 never flattens. Default: 0.5 exact, 0.8 sampled.",
        )
        flatten_fact: str | None = Field(
            None,
            description="What φ takes in place of the reward: a fact that the reward function or the "
            "environment tells of each response. Default: the reward.",
        )
        entropy_coefficient: NonNegativeFloat = Field(1e-3, description="β.")
        loss_aggregation: Aggregation = Field(
            "token_mean",
            description="`token_mean`: over all response tokens of the minibatch; `sequence_mean`: over each "
            "response's tokens, then over responses; `constant`: sum over tokens divided by responses × "
            "max_response_tokens.",
        )
        audit_estimators: bool = Field(
            False,
            description="Report bias and variance of the sampled estimators against the exact divergences, "
            "on the same tokens. Costs one more pass over the reference's logits.",
        )

        def without_effect(self) -> dict[str, str]:
            inert = super().without_effect()
            if self.divergence_coefficient == 0:
                options = ["divergence", "flatten_floor", "flatten_fact"]
                inert |= dict.fromkeys(options, "divergence_coefficient is 0")
            elif self.flatten_floor == 1:
                inert["flatten_fact"] = "flatten_floor = 1 never flattens"
            return inert

        @property
        def phi_floor(self) -> float:
            """φ0, with its default."""
            if self.flatten_floor is not None:
                return self.flatten_floor
            return 0.5 if self.divergence in ("forward_exact", "reverse_flattened") else 0.8

    options: Options

    @property
    def aggregation(self) -> Aggregation:  # type: ignore[override]
        return self.options.loss_aggregation

    @property
    def facts(self) -> Sequence[str]:
        return (self.options.flatten_fact,) if self.options.flatten_fact else ()

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def flatten(self, groups: Sequence[Group]) -> OfEpisodes:
        """φ(r), that of a failed response where r is unknown."""
        floor, fact = self.options.phi_floor, self.options.flatten_fact
        told = known_rewards(groups) if fact is None else known_facts(groups, fact, "algorithm.flatten_fact")
        return floor + (1.0 - floor) * np.ma.filled(told, 0.0).clip(0.0, 1.0)

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        terms: list[tuple[float, Term]] = [(1.0, o.surrogate())]
        if o.divergence_coefficient:
            terms.append((o.divergence_coefficient, Divergence(o.divergence)))
        terms.append((-o.entropy_coefficient, Entropy()))
        if o.audit_estimators:
            terms.append((0.0, Audit()))
        return terms
