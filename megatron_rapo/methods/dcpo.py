"""DCPO (Distribution-Centric, arXiv 2601.12730): entropy held as if another distribution sampled.

    A'_t = (1 − a) A_i + a · 1[r_i > 0] · ρ_t,   ρ_t = π_old^T(y_t) / π_old(y_t)
    a = c / (1 + c),   c = min(|H0 − H|, λ) / share of responses with r > 0
    T = T_high where H ≤ H0, else T_low

in GRPO's clipped surrogate. The second part is REINFORCE on right responses, weighted as if π_old had
sampled them at temperature T: what it draws to is a flatter distribution than the policy where the entropy
H is too low, and a sharper one where it is too high, without a sample from it. AEPO draws those samples.
Formulas after the public code (github.com/597358816/DCPO). Ours: H is the mean entropy of the step before's
updates; in the first step, of which nothing is known, there is no second part; A_i is by the sample's
deviation (n − 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.tempered import Tempered
from megatron_rapo.methods.terms.policy_gradient import AdvantageOfMark
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import Fraction, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class DCPO(Method):
    """Right responses count as if a flatter or sharper policy had sampled them, to hold the entropy."""

    class Options(Tempered):
        """DCPO (arXiv 2601.12730)."""

        method: str = "dcpo"
        target_entropy: PositiveFloat = Field(0.25, description="H0, in nats.")
        largest_weight: Fraction = Field(0.1, description="λ: of the entropy's distance from H0.")

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self.entropy: float | None = None  # of the last step

    @property
    def tempered(self) -> float | None:  # type: ignore[override]
        return self.options.against(math.inf if self.entropy is None else self.entropy)

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """GRPO's; the marks replace them."""
        return standardised(known_rewards(groups))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        right = np.ma.filled(known_rewards(groups) > 0.0, False)
        known = known_rewards(groups).count()
        share = right.sum() / known if known else 0.0
        apart = 0.0 if self.entropy is None else abs(self.options.target_entropy - self.entropy)
        weight = min(apart, self.options.largest_weight)
        self._mixed = weight / (weight + share) if share else 0.0  # a
        return {"right": right.astype(np.float64)}

    def mark_tokens(self, tokens: Annotated) -> Mapping[str, Tensor]:
        """A' of each token."""
        assert tokens.tempered_log_probs is not None
        ratio = (tokens.tempered_log_probs - tokens.old_log_probs).exp()
        reinforced = tokens.marks["right"] * ratio
        return {"advantage": (1.0 - self._mixed) * tokens.advantages + self._mixed * reinforced}

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        return [(1.0, AdvantageOfMark(o.clip_low, o.clip_high, o.clip_dual))]

    def learn(self, measured: Mapping[str, float]) -> None:
        self.entropy = measured["loss/entropy"]

    def state(self) -> Any:
        return {"entropy": self.entropy}

    def restore(self, state: Any) -> None:
        self.entropy = state["entropy"]
