"""Dr. GRPO (arXiv 2503.20783): GRPO without its two biases, those of length and of difficulty.

    J = E[ 1/G Σ_i Σ_t min(w A_i, clip(w, 1 − ε, 1 + ε) A_i) ],   A_i = r_i − mean r        (section 3.2)

so no division by a response's length nor by the group's deviation, and no divergence. As in the paper's code,
the sum over tokens is divided by a constant, the longest response that is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import centred
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term


class DrGRPO(Method):
    """Clipped policy gradient, summed over tokens, of advantages that are not standardised."""

    class Options(Clipping):
        """Dr. GRPO (arXiv 2503.20783)."""

        method: str = "dr_grpo"

    options: Options
    aggregation = "constant"

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return centred(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
