"""CoPG (Contrastive Policy Gradient, arXiv 2406.19185): pairs of responses, off-policy without a ratio.

    ∇J = E[ 1/(k − 1) Σ_{i≠j} (R_β(y_i) − R_β(y_j)) ∇ log π(y_i) ]
    R_β(y) = r(y) − β log π(y) / π_ref(y)

over the k responses to a prompt, with π as it is now: β goes into the advantage, and no divergence beside
it. The gradient is that of −1/(2β (k − 1)) Σ_{i>j} (R_β(y_i) − R_β(y_j))², so that at the optimum R_β is
the same for all responses, whoever sampled them. After the abstract and public descriptions. Ours: all
pairs of a group; the sum over tokens is divided by the longest response that is allowed, which says no more
than how fast to learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.by_episode import Responses
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.options import Options as Common
from megatron_rapo.methods.terms.term import AtToken, Need, Term
from megatron_rapo.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class CoPG(Method):
    """Responses of a group are compared in pairs, by reward less β · log π / π_ref, without a ratio."""

    aggregation = "constant"
    follows_policy = True

    class Options(Common):
        """CoPG (arXiv 2406.19185)."""

        method: str = "copg"
        beta: PositiveFloat = Field(0.1, description="β: how much staying near the reference counts.")

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """0: they are marks, as they depend on the policy at each update."""
        return [[0.0] * len(group.episodes) for group in groups]

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        self._rewards, self._responses = known_rewards(groups), Responses(groups)
        return self._responses.marks()

    def mark_tokens(self, tokens: Annotated) -> Mapping[str, Tensor]:
        """Σ_j (R_β(y_i) − R_β(y_j)) / (k − 1) of each token's response i."""
        assert tokens.reference_log_probs is not None
        log_ratios = self._responses.sums(tokens.log_probs - tokens.reference_log_probs, tokens)
        shaped = self._rewards - self.options.beta * log_ratios
        k = shaped.count(axis=1)[:, None]
        contrast = (shaped - shaped.mean(axis=1, keepdims=True)) * k / (k - 1).clip(min=1)
        return {"contrast": self._responses.spread(contrast, tokens)}

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, Contrast())]


@dataclass(frozen=True)
class Contrast(Term):
    """−c · log π, c the response's contrast to the others; the reference is read for c."""

    needs = frozenset({Need.REFERENCE_LOG_PROB})
    reads = frozenset({"contrast"})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `contrast`."""
        loss = -token.marks["contrast"].to(token.log_prob.dtype) * token.log_prob
        return loss, {"contrast": loss}
