"""GSPO (arXiv 2507.18071): ratios, clips and rewards of whole sequences.

    J = E[ 1/G Σ_i min(s_i A_i, clip(s_i, 1 − ε_left, 1 + ε_right) A_i) ]      (eq. 5)
    s_i = (π(y_i) / π_old(y_i))^(1/|y_i|)                                      (eq. 7)
    A_i = (r_i − mean r) / std r                                               (eq. 6)

with no divergence. The loss is a value a token here, so s_i has the response's value and the token's own
gradient at each of its tokens, over which it is averaged (the paper's GSPO-token, which is the same where a
response has one advantage).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import BelowOne, NonNegativeFloat


class GSPO(Method):
    """Clipped policy gradient with the ratio of the whole response."""

    class Options(Clipping):
        """GSPO (arXiv 2507.18071)."""

        method: str = "gspo"
        clip_low: BelowOne = Field(3e-4, description="ε_left: the ratio is clipped below at 1 − this.")
        clip_high: NonNegativeFloat = Field(
            4e-4, description="ε_right: the ratio is clipped above at 1 + this."
        )

    options: Options
    aggregation = "sequence_mean"

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate(sequence=True))]
