"""RLOO (arXiv 2402.14740): REINFORCE with the other responses' mean as its baseline.

    ∇J = E[ 1/G Σ_i A_i ∇ log π(y_i) ],   A_i = r_i − mean of the rewards of the group's others

A response is one action, so the sum over its tokens is not divided by their number; it is divided by a
constant, the longest response that is allowed, which says no more than how fast to learn. Ours, as in TRL:
the ratio π / π_old and its clip, for steps of several updates (on the first they change nothing); the paper's
divergence, which it adds to the reward, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import leave_one_out
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term


class RLOO(Method):
    """Clipped policy gradient, summed over tokens, against a baseline that leaves the response out."""

    class Options(Clipping):
        """RLOO (arXiv 2402.14740)."""

        method: str = "rloo"

    options: Options
    aggregation = "constant"

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return leave_one_out(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
