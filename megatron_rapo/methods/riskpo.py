"""RiskPO (arXiv 2510.00911): quantiles of what bundles of prompts earn, of which the lower weigh more.

    A(R) = −ω (q_α − R)₊ − (q_β − R)₊, less its mean over the step's bundles
    R = Σ r over the j-th responses to the B prompts of a bundle
    q ← q + γ (level − share of the step's R that are at most q)

A is the gradient's weight under the mixed value-at-risk (1 + ω) ∫_0^α + ∫_α^β of R's quantile function:
what a bundle earns counts below q_β alone, and more below q_α. After the abstract, public descriptions and
the public code (github.com/RTkenny/RiskPO). Ours: q begins at the first step's quantile; bundles are of
prompts in the order of their ids, so that the order of groups does not matter; the last bundle may have
fewer prompts, and its R is scaled to B; a bundle with an unknown reward has A = 0; no scaling by the
bundle's deviation, and no divergence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.quantiles import tracked
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


class RiskPO(Method):
    """What bundles of prompts earn counts below a tracked quantile alone, and more below a lower one."""

    class Options(Clipping):
        """RiskPO (arXiv 2510.00911)."""

        method: str = "riskpo"
        bundle_prompts: PositiveInt = Field(5, description="B: prompts of a bundle.")
        lower_level: Fraction = Field(0.2, description="α: below this quantile a bundle counts 1 + ω times.")
        upper_level: Fraction = Field(0.8, description="β: above this quantile it does not count.")
        tail_weight: NonNegativeFloat = Field(0.5, description="ω: how much more the lower tail counts.")
        quantile_rate: PositiveFloat = Field(0.1, description="γ: how fast quantiles are tracked.")

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        if options.lower_level >= options.upper_level:
            raise ValueError(
                f"lower_level = {options.lower_level} is not below upper_level = {options.upper_level}; "
                "lower it"
            )
        self.quantiles: list[float] | None = None  # at lower_level and upper_level

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        rewards, size = known_rewards(groups), self.options.bundle_prompts
        order = sorted(range(len(groups)), key=lambda place: groups[place].problem.id)
        bundles = [order[start : start + size] for start in range(0, len(order), size)]
        earned = np.ma.stack([_sums(rewards[bundle]) * (size / len(bundle)) for bundle in bundles])
        known = earned.compressed().tolist()
        if not known:
            return np.zeros(rewards.shape)
        low, high = self._track(known)
        o = self.options
        gains = -o.tail_weight * (low - earned).clip(min=0.0) - (high - earned).clip(min=0.0)
        centred = np.ma.filled(gains - gains.mean(), 0.0)
        found = np.zeros(rewards.shape)
        for bundle, gain in zip(bundles, centred, strict=True):
            found[bundle] = gain
        return found

    def _track(self, earned: list[float]) -> list[float]:
        """The quantiles as they were before this step, which then moves them."""
        levels = (self.options.lower_level, self.options.upper_level)
        before = self.quantiles or [float(np.quantile(earned, level)) for level in levels]
        rate = self.options.quantile_rate
        self.quantiles = [
            tracked(quantile, level, earned, rate) for quantile, level in zip(before, levels, strict=True)
        ]
        return before

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]

    def metrics(self) -> Mapping[str, float]:
        """The tracked quantiles."""
        names = ("lower_quantile", "upper_quantile")
        return dict(zip(names, self.quantiles or [], strict=False))

    def state(self) -> Any:
        return self.quantiles

    def restore(self, state: Any) -> None:
        self.quantiles = state


def _sums(rewards: Any) -> Any:
    """`[episodes]`: Σ over `[prompts, episodes]`; masked where one is unknown."""
    return np.ma.masked_where(np.ma.getmaskarray(rewards).any(axis=0), rewards.sum(axis=0))
