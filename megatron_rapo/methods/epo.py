"""EPO (Entropy-regularized Policy Optimization, for agents, arXiv 2509.22576): entropy near its own history.

    L = L_PPO − λ ( H − η β_k · P )
    P_t = distance of H_t from [κ_l H̄, κ_r H̄], H̄ the mean entropy of all steps before
    β_k = 1 − 0.2 (1 − e^(−2x)) where x ≤ 1, then 0.8 e^(−3 (x − 1));   x = k / (K/2), at most 2

After the abstract and the public code (github.com/WujiangXu/EPO). Ours: outside the band P is the distance
to it; in that code it is a constant, which has no gradient. H̄ is of all turns alike (there, of each turn),
and none before the first step; advantages are GRPO's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.entropy import Entropy
from megatron_rapo.methods.terms.term import AtToken, Term
from megatron_rapo.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor


class EPO(Method):
    """An entropy bonus, and a penalty of entropies far from the mean of earlier steps, by a schedule."""

    class Options(Clipping):
        """EPO (arXiv 2509.22576)."""

        method: str = "epo"
        entropy_coefficient: PositiveFloat = Field(1e-3, description="λ, of the entropy bonus.")
        smoothing: NonNegativeFloat = Field(1.0, description="η, of the penalty beside the bonus.")
        band_low: Fraction = Field(0.8, description="κ_l: the band begins at this multiple of H̄.")
        band_high: float = Field(1.2, ge=1, allow_inf_nan=False, description="κ_r: and ends at this one.")
        schedule_steps: PositiveInt = Field(150, description="K: the penalty's weight falls over them.")

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self.steps, self.total = 0, 0.0  # that are over, and the sum of their mean entropies

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        mean = self.total / self.steps if self.steps else None
        band = (o.band_low * mean, o.band_high * mean) if mean is not None else (0.0, math.inf)
        penalty = o.entropy_coefficient * o.smoothing * self._schedule()
        return [(1.0, o.surrogate()), (-o.entropy_coefficient, Entropy()), (penalty, OutsideBand(*band))]

    def _schedule(self) -> float:
        """β_k."""
        progress = min(2.0 * self.steps / self.options.schedule_steps, 2.0)
        if progress <= 1.0:
            return 1.0 - 0.2 * (1.0 - math.exp(-2.0 * progress))
        return 0.8 * math.exp(-3.0 * (progress - 1.0))

    def learn(self, measured: Mapping[str, float]) -> None:
        self.steps += 1
        self.total += measured["loss/entropy"]

    def state(self) -> Any:
        return {"steps": self.steps, "total": self.total}

    def restore(self, state: Any) -> None:
        self.steps, self.total = state["steps"], state["total"]


@dataclass(frozen=True)
class OutsideBand(Term):
    """How far a token's entropy is outside [low, high]."""

    low: float
    high: float

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `outside_band`."""
        distance = token.entropy - token.entropy.detach().clamp(self.low, self.high)
        outside = distance.abs()
        return outside, {"outside_band": outside}
