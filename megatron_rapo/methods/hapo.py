"""HAPO ("From Uniform to Heterogeneous", arXiv 2509.16591): advantage and clip of a token by its entropy.

    ĥ_t = h / max h where h > 0, h / |min h| elsewhere;   h = (log H_t − q) / s, q the τ-quantile of log H
    A_i = (r_i − mean_T r) / std_T r, over the group's tokens            (token-level group average)
    ε_low (1 − α min(ĥ, 0)),   ε_high (1 + α max(ĥ, 0))                     (asymmetric adaptive clipping)
    A'_t = A_i (1 + β ĥ_t)  where ĥ > 0 and w is outside (1 − ε_low/2, 1 + ε_high/2),
                            or ĥ ≤ 0 and w is inside;  A_i elsewhere             (differential redistribution)

over all tokens alike, with dual clip and no divergence; H is of the policy that starts the step. Formulas
after the public code (github.com/starriver030515/HAPO), as the paper's text was not at hand. Ours: ĥ is of
all tokens of the minibatch, and negative below the quantile, as the clip's formula asks for (that code
divides by min h itself, which makes it positive); a group of which a token-level |A| reaches 5 takes GRPO's
advantages, as there. Its adaptive temperature (T (1 + 0.05 ĥ) token by token) needs an engine that has it,
and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised, varies
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.overlong import sampled_tokens
from megatron_rapo.methods.quantiles import quantile
from megatron_rapo.methods.terms.policy_gradient import PolicyGradient
from megatron_rapo.methods.terms.term import AtToken, Term
from megatron_rapo.section import Fraction

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 5.0  # of a token-level advantage
_LEAST_ENTROPY = 1e-8


class HAPO(Method):
    """Advantages over the group's tokens, and advantages and clip bounds that depend on a token's entropy."""

    class Options(Clipping):
        """HAPO (arXiv 2509.16591)."""

        method: str = "hapo"
        clip_dual: float | None = Field(
            10.0,
            gt=1,
            allow_inf_nan=False,
            description="c: bound of the surrogate of negative advantages, c · A.",
        )
        entropy_pivot: Fraction = Field(0.8, description="τ: the quantile of log H above which ĥ > 0.")
        clip_alpha: Fraction = Field(1.0, description="α: how far entropy widens the clip bounds.")
        advantage_beta: Fraction = Field(1.0, description="β: how far entropy changes advantages.")

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        rewards = known_rewards(groups)
        lengths = np.ma.array(sampled_tokens(groups), mask=np.ma.getmaskarray(rewards))
        mean = (rewards * lengths).sum(1, keepdims=True) / lengths.sum(1, keepdims=True)
        variance = ((rewards - mean) ** 2 * lengths).sum(1, keepdims=True) / lengths.sum(1, keepdims=True)
        of_tokens = (rewards - mean) / np.ma.sqrt(np.ma.masked_equal(variance, 0.0))
        too_large = np.ma.filled(np.ma.abs(of_tokens).max(1, keepdims=True) >= _LARGEST, True)
        found = np.where(too_large, standardised(rewards), np.ma.filled(of_tokens, 0.0))
        return np.where(varies(rewards)[:, None], found, 0.0)

    def mark_tokens(self, tokens: Annotated) -> Mapping[str, Tensor]:
        """ĥ of each token."""
        own = tokens.old_entropies.double().clamp(min=_LEAST_ENTROPY).log()
        logs = tokens.of_all_ranks(own)
        pivot = quantile(logs, self.options.entropy_pivot)
        highest, lowest = (logs - pivot).max(), (logs - pivot).min()
        above = (own - pivot) / highest.clamp(min=_LEAST_ENTROPY)
        below = (own - pivot) / (-lowest).clamp(min=_LEAST_ENTROPY)
        return {"relative_entropy": above.where(own > pivot, below)}

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        surrogate = ByEntropy(o.clip_low, o.clip_high, o.clip_dual, alpha=o.clip_alpha, beta=o.advantage_beta)
        return [(1.0, surrogate)]


@dataclass(frozen=True)
class ByEntropy(PolicyGradient):
    """The clipped surrogate, with A and ε of the token's relative entropy ĥ."""

    alpha: float = 1.0
    beta: float = 1.0
    reads = frozenset({"relative_entropy"})

    def _bounds(self, token: AtToken) -> dict[str, Any]:
        h = token.marks["relative_entropy"].to(token.log_prob.dtype)
        return {
            "clip_low": self.clip_low * (1.0 - self.alpha * h.clamp(max=0.0)),
            "clip_high": self.clip_high * (1.0 + self.alpha * h.clamp(min=0.0)),
        }

    def _advantage(self, token: AtToken) -> Tensor:
        h = token.marks["relative_entropy"].to(token.log_prob.dtype)
        bounds, ratio = self._bounds(token), (token.log_prob.detach() - token.old_log_prob).exp()
        inside = (ratio > 1.0 - bounds["clip_low"] / 2) & (ratio < 1.0 + bounds["clip_high"] / 2)
        changed = inside != (h > 0)
        return token.advantage * (1.0 + self.beta * h * changed)
