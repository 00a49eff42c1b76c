"""BAPO (arXiv 2510.18927): clip bounds that give tokens with A > 0 their share of the surrogate.

    J = E[ 1/Σ|o_i| Σ_i Σ_t min(w A_i, clip(w, c_low, c_high) A_i) ],   A_i = (r_i − mean r) / std r

    Σ_{A>0} min(w, c_high) A  ≥  ρ0 · Σ |min(w A, clip(w, c_low, c_high) A)|

At each update c_high grows by δ1 from a⁺ to at most b⁺ until the share is reached, then c_low by δ2 from a⁻
to at most b⁻. After the abstract and public descriptions. Ours: sums over the minibatch's tokens with their
weights in the loss. By its value, as here and in the public code (github.com/WooooDyy/BAPO, which raises
c_low first, with other steps), a higher c_low takes gradient from tokens with A < 0, though it makes their
part larger. A step's first update finds w = 1, so that no bound matters there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.options import Options as Common
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.policy_gradient import BoundsOfMarks
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import Fraction, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class BAPO(Method):
    """Clip bounds are widened at each update until tokens with A > 0 make their share of the surrogate."""

    follows_policy = True

    class Options(Common):
        """BAPO (arXiv 2510.18927)."""

        method: str = "bapo"
        positive_share: Fraction = Field(0.4, description="ρ0: the share of tokens with A > 0.")
        lowest_ratio: Fraction = Field(0.6, description="a⁻: c_low, the ratio's lower bound, at first.")
        lowest_ratio_limit: Fraction = Field(0.9, description="b⁻: c_low at most.")
        lowest_ratio_step: PositiveFloat = Field(0.02, description="δ2: by which c_low grows.")
        highest_ratio: float = Field(
            1.2, ge=1, allow_inf_nan=False, description="a⁺: c_high, the ratio's upper bound, at first."
        )
        highest_ratio_limit: float = Field(3.0, ge=1, allow_inf_nan=False, description="b⁺: c_high at most.")
        highest_ratio_step: PositiveFloat = Field(0.05, description="δ1: by which c_high grows.")

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        for name in ("lowest_ratio", "highest_ratio"):
            first, limit = getattr(options, name), getattr(options, f"{name}_limit")
            if first > limit:
                raise ValueError(f"{name} = {first} is above {name}_limit = {limit}; lower it")

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def mark_tokens(self, tokens: Annotated) -> Mapping[str, Tensor]:
        """1 − c_low and c_high − 1, the same of all tokens."""
        import torch  # late: options are read without it

        o = self.options
        lows = _grid(o.lowest_ratio, o.lowest_ratio_limit, o.lowest_ratio_step)
        highs = _grid(o.highest_ratio, o.highest_ratio_limit, o.highest_ratio_step)
        ratio, size = (tokens.log_probs - tokens.old_log_probs).exp(), tokens.weights * tokens.advantages
        parts = [
            *((size.clamp(min=0) * ratio.clamp(max=high)).sum() for high in highs),
            *(((-size).clamp(min=0) * ratio.clamp(min=low)).sum() for low in lows),
        ]
        totals = tokens.of_all_ranks(torch.stack(parts)).reshape(-1, len(parts)).sum(0).tolist()
        positive, negative = totals[: len(highs)], totals[len(highs) :]
        high, low = self._bounds(positive, negative)
        return {
            "clip_low": ratio.new_full(ratio.shape, 1.0 - lows[low]),
            "clip_high": ratio.new_full(ratio.shape, highs[high] - 1.0),
        }

    def _bounds(self, positive: Sequence[float], negative: Sequence[float]) -> tuple[int, int]:
        """Which of the upper and of the lower bounds are the first to give the share; else the last."""
        candidates = [(high, 0) for high in range(len(positive))]
        candidates += [(len(positive) - 1, low) for low in range(1, len(negative))]
        for high, low in candidates:
            if positive[high] >= self.options.positive_share * (positive[high] + negative[low]):
                return high, low
        return candidates[-1]

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, BoundsOfMarks())]


def _grid(first: float, last: float, step: float) -> list[float]:
    """From the first to the last, which ends it wherever the steps fall."""
    return [*np.arange(first, last - 1e-9, step).tolist(), last]
