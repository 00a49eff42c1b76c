"""Lite PPO ("Tricks or Traps?", arXiv 2508.08221): two tricks on plain PPO without a critic.

    J = E[ 1/Σ|o_i| Σ_i Σ_t min(w A_i, clip(w, 1 − ε, 1 + ε) A_i) ]
    A_i = (r_i − mean of the group) / std of the batch

The tricks are the batch's standard deviation in place of the group's, and the mean over all tokens; there is
no divergence. Ours: the sample's standard deviation (n − 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import over_batch_deviation
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term


class LitePPO(Method):
    """Clipped policy gradient of advantages that are scaled by the batch's deviation."""

    class Options(Clipping):
        """Lite PPO (arXiv 2508.08221)."""

        method: str = "lite_ppo"

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return over_batch_deviation(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
