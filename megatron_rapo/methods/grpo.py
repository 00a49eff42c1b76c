"""GRPO (DeepSeekMath, arXiv 2402.03300): advantages from a group in place of a critic.

    J = E[ 1/G Σ_i 1/|o_i| Σ_t ( min(w A_i, clip(w, 1 − ε, 1 + ε) A_i) − β · KL(π ‖ π_ref) ) ]     (eq. 3)
    A_i = (r_i − mean r) / std r                              (outcome supervision, section 4.1.2)
    KL estimated as π_ref/π − log π_ref/π − 1, at the sampled token                           (eq. 4)

Ours: the sample's standard deviation (n − 1), as in TRL and verl; other estimates of the divergence, and an
entropy bonus, as options for comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.aggregation import Aggregation
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.divergences import Divergence, ReverseKind
from megatron_rapo.methods.terms.entropy import Entropy
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import NonNegativeFloat


class GRPO(Method):
    """Clipped policy gradient + β · KL(policy ‖ reference)."""

    class Options(Clipping):
        """GRPO (arXiv 2402.03300)."""

        method: str = "grpo"
        divergence: ReverseKind = Field(
            "k3",
            description="KL(policy ‖ reference). `k3`: the paper's estimate at the sampled token; `k1`, "
            "`k2`: other usual ones; `reverse_exact`: over the vocabulary.",
        )
        divergence_coefficient: NonNegativeFloat = Field(
            0.04, description="β of the paper; 0: no divergence, and no reference is loaded."
        )
        entropy_coefficient: NonNegativeFloat = Field(0.0, description="Of an entropy bonus.")
        loss_aggregation: Aggregation = Field(
            "sequence_mean",
            description="`sequence_mean`: over each response's tokens, then over responses; `token_mean`: "
            "over all response tokens of the minibatch; `constant`: sum over tokens divided by responses × "
            "max_response_tokens.",
        )

        def without_effect(self) -> dict[str, str]:
            inert = {} if self.divergence_coefficient else {"divergence": "divergence_coefficient is 0"}
            return super().without_effect() | inert

    options: Options

    @property
    def aggregation(self) -> Aggregation:  # type: ignore[override]
        return self.options.loss_aggregation

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        terms: list[tuple[float, Term]] = [(1.0, o.surrogate())]
        if o.divergence_coefficient:
            terms.append((o.divergence_coefficient, Divergence(o.divergence)))
        if o.entropy_coefficient:
            terms.append((-o.entropy_coefficient, Entropy()))
        return terms
