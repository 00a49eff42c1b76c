"""The options of methods with a clipped surrogate, and its term."""

from __future__ import annotations

from pydantic import Field

from megatron_rapo.methods.options import Options
from megatron_rapo.methods.terms.policy_gradient import PolicyGradient
from megatron_rapo.section import BelowOne, NonNegativeFloat


class Clipping(Options):
    """How far the ratio of new to old policy may carry the loss (PPO, arXiv 1707.06347, eq. 7)."""

    clip_low: BelowOne = Field(0.2, description="ε_low: the ratio is clipped below at 1 − this.")
    clip_high: NonNegativeFloat = Field(0.2, description="ε_high: the ratio is clipped above at 1 + this.")
    clip_dual: float | None = Field(
        None,
        gt=1,
        allow_inf_nan=False,
        description="c: bound of the surrogate of negative advantages, c · A (dual clip). "
        "Default: unbounded.",
    )

    def surrogate(self, *, sequence: bool = False) -> PolicyGradient:
        """The term; with ratios of whole responses if `sequence`."""
        return PolicyGradient(self.clip_low, self.clip_high, self.clip_dual, sequence)
