"""CAPO (Curvature-Aware, arXiv 2510.00819): tokens whose own step would move the policy the most are masked.

    m_t = (A_t ‖u_t‖²)²,   u_t = 1[y_t] − π_old(· | t),   ‖u_t‖² = 1 − 2 π_old(y_t) + Σ_v π_old(v)²
    the ⌊ν N⌋ of the N tokens with the largest m_t are masked

on GRPO's advantages and clipped surrogate, averaged over the tokens that are left. In a model of the last
layer alone, a token's own step Δ = A u hᵀ moves log π(y) by A ‖u‖² ‖h‖²: its square is Δᵀ F̂ Δ, F̂ the token's
Fisher information, by which the paper bounds how far an update may move the policy. After the abstract and
public descriptions, which give no formula. Ours: a step of gradient descent, where the paper models the
optimizer; one token at a time; ‖h‖ is taken to be the same everywhere, as a model's last norm makes it
nearly; no bound on the objective's change, for which the paper has the Hessian too; the share ν in place of a
threshold: the paper says that fewer than 8% of tokens are rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.masking import masked
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import BelowOne

if TYPE_CHECKING:
    from torch import Tensor


class CAPO(Method):
    """Clipped policy gradient without the tokens whose own step would move the policy the most."""

    class Options(Clipping):
        """CAPO (arXiv 2510.00819)."""

        method: str = "capo"
        rejected_share: BelowOne = Field(0.08, description="ν: of the tokens in the loss.")

    options: Options
    tempered = 0.5  # of which Σ π² comes

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def weigh(self, tokens: Annotated) -> Tensor:
        """The weights of the tokens that are left, which add up to what all did."""
        # With z the logits, log π^(T = ½)(y) = 2 z_y − log Σ e^2z, and 2 log π(y) = 2 z_y − 2 log Σ e^z.
        assert tokens.tempered_log_probs is not None
        collision = (2.0 * tokens.old_log_probs - tokens.tempered_log_probs).exp()
        size = 1.0 - 2.0 * tokens.old_log_probs.exp() + collision
        moved = (tokens.advantages * size).square()
        of_all = tokens.of_all_ranks(moved[tokens.weights > 0])
        if not len(of_all):
            return tokens.weights
        left = len(of_all) - int(self.options.rejected_share * len(of_all))
        return masked(tokens, moved <= of_all.kthvalue(left).values)

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
