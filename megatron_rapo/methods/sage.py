"""SAGE (Shaping Anchors for Guided Exploration, arXiv 2605.18864): the KL pulls to a reshaped reference.

    J = E[ 1/G Σ_i 1/|o_i| Σ_t ( min(w A_i, clip(w, 1 − ε, 1 + ε) A_i) − β · KL(π ‖ q · π_ref) ) ]
    q_t = min(1 + η (H_t − h)₊, q_max)                                           (the branch-level guide)
    KL estimated as ρ − log ρ − 1,  ρ = q π_ref / π at the sampled token

RAPO's nearest relative: where RAPO flattens the reference by the reward, SAGE raises its probability of
what was sampled where the policy is undecided. H is of the policy as it is, a constant. Formulas and
defaults are those of the public code (github.com/tally0818/SAGE); q · π_ref is not normalised, as there.
Ours: the sample's standard deviation (n − 1). The guides by token surprisal and at random, which that code
has too, are left out: they draw random numbers in the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import AtToken, Need, Term, present
from megatron_rapo.section import NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class SAGE(Method):
    """The KL's reference holds tokens for more probable where the policy's entropy is high."""

    aggregation = "sequence_mean"

    class Options(Clipping):
        """SAGE (arXiv 2605.18864)."""

        method: str = "sage"
        divergence_coefficient: PositiveFloat = Field(0.05, description="β, of the divergence.")
        guide_ratio: NonNegativeFloat = Field(0.3, description="η: how much q grows with the entropy.")
        entropy_threshold: NonNegativeFloat = Field(1.2, description="h: above it, in nats, q grows.")
        guide_maximum: float = Field(1.4, ge=1, allow_inf_nan=False, description="q_max.")

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        anchored = ShapedAnchor(o.guide_ratio, o.entropy_threshold, o.guide_maximum)
        return [(1.0, o.surrogate()), (o.divergence_coefficient, anchored)]


@dataclass(frozen=True)
class ShapedAnchor(Term):
    """ρ − log ρ − 1 with ρ = q π_ref / π, q made of the policy's entropy."""

    ratio: float
    threshold: float
    maximum: float
    needs = frozenset({Need.REFERENCE_LOG_PROB})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `divergence`, and q as `guide`."""
        guide = (1.0 + self.ratio * (token.entropy.detach() - self.threshold).clamp(min=0.0)).clamp(
            max=self.maximum
        )
        log_rho = present(token.reference_log_prob) + guide.log() - token.log_prob
        divergence = log_rho.exp() - log_rho - 1.0
        return divergence, {"divergence": divergence, "guide": guide}
