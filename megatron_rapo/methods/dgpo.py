"""DGPO (MathForge, arXiv 2601.20614): harder questions count more.

    J = E[ 1/Σ|o_i| Σ_i Σ_t λ min(w A_i, clip(w, 1 − ε, 1 + ε) A_i) ]
    A_i = (r_i − mean r) / mean |r − mean r|,   λ = softmax(−mean r / 2) over the questions, scaled to mean 1

The mean absolute deviation in place of the standard deviation gives each question updates of one size; λ
then prefers the harder ones. Tokens are averaged over the groups whose rewards differ. After the abstract and
public descriptions. Ours: λ is part of the advantage, which is the same, as it is positive; no divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import weighted_by_difficulty
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term


class DGPO(Method):
    """Clipped policy gradient of advantages that are balanced over questions and weighted by difficulty."""

    class Options(Clipping):
        """DGPO (arXiv 2601.20614)."""

        method: str = "dgpo"
        groups_without_variance: Literal["keep", "keep_failed", "drop"] = Field(
            "drop",
            description="Groups whose responses all earned the same: `drop` leaves them out of the mean "
            "over tokens, as the paper does; `keep_failed` keeps those in which all failed, `keep` all.",
        )

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return weighted_by_difficulty(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
