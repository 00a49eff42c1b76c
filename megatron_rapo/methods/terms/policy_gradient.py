"""The clipped policy-gradient term, with ratios of tokens or of whole responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_rapo.methods.terms.term import OF_SEQUENCES, AtToken, Need, Term, present

if TYPE_CHECKING:
    from torch import Tensor


class Surrogate(NamedTuple):
    """Per token, `[tokens]`: what to maximise, and whether a clip took its gradient away."""

    value: Tensor
    clipped: Tensor


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    clip_dual: float | None = None,
) -> Surrogate:
    """min(w A, clip(w, 1 − clip_low, 1 + clip_high) A), w = exp(log_ratio) (PPO, arXiv 1707.06347, eq. 7).

    Bounds are numbers, or `[tokens]`. With `clip_dual` = c, the surrogate of a negative advantage is at least
    c A (arXiv 1912.09729).
    """
    ratio = log_ratio.exp()
    advantages = advantages.to(ratio.dtype)
    bounded = ratio.clamp(min=1.0 - clip_low).clamp(max=1.0 + clip_high)
    unclipped, limited = ratio * advantages, bounded * advantages
    value, clipped = unclipped.minimum(limited), limited < unclipped
    if clip_dual is not None:
        floor = clip_dual * advantages
        dropped = (advantages < 0) & (value < floor)
        value, clipped = floor.where(dropped, value), clipped | dropped
    return Surrogate(value, clipped)


def with_sequence_value(log_prob: Tensor, sequence_log_ratio: Tensor) -> Tensor:
    """A token's log-ratio that is its response's in value, and its own in gradient (GSPO, arXiv 2507.18071).

    With every token of a response weighted alike, the sum over tokens then has the gradient of the mean.
    """
    return sequence_log_ratio + log_prob - log_prob.detach()


@dataclass(frozen=True)
class PolicyGradient(Term):
    """−u · min(w A, clip(w) A), u the importance weight.

    With ratios of responses u is the mean over the response. All of its tokens have one w there, so no other
    than the mean of their weights is in the loss and its gradient, if they have one A as well.

    Attributes:
        clip_low, clip_high: the ratio w is clipped to [1 − clip_low, 1 + clip_high].
        clip_dual: bound of the surrogate of negative advantages, in multiples of A.
        sequence: w = π / π_old of the token, or its geometric mean over the response.
    """

    clip_low: float
    clip_high: float
    clip_dual: float | None = None
    sequence: bool = False

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """Importance weights of tokens, or weights and log-ratios of responses."""
        return OF_SEQUENCES if self.sequence else frozenset({Need.IMPORTANCE})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `policy`, and the share of `clipped` tokens."""
        if self.sequence:
            log_ratio = with_sequence_value(token.log_prob, present(token.sequence_log_ratio))
            importance = present(token.sequence_importance)
        else:
            log_ratio = token.log_prob - token.old_log_prob
            importance = present(token.importance)
        surrogate = clipped_surrogate(
            log_ratio,
            self._advantage(token),
            **self._bounds(token),
            clip_dual=self.clip_dual,
        )
        policy = -importance * surrogate.value
        return policy, {"policy": policy, "clipped": surrogate.clipped}

    def _advantage(self, token: AtToken) -> Tensor:
        return token.advantage

    def _bounds(self, token: AtToken) -> dict[str, Any]:
        return {"clip_low": self.clip_low, "clip_high": self.clip_high}


@dataclass(frozen=True)
class AdvantageOfMark(PolicyGradient):
    """The same, with the mark `advantage` of a token: one that is known once its log-probs are."""

    reads = frozenset({"advantage"})

    def _advantage(self, token: AtToken) -> Tensor:
        return token.marks["advantage"]


@dataclass(frozen=True)
class BoundsOfMarks(PolicyGradient):
    """The same, with bounds of the ratio that are the marks `clip_low` and `clip_high` of a token."""

    clip_low: float = 0.0  # not read
    clip_high: float = 0.0
    reads = frozenset({"clip_low", "clip_high"})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports the bounds too."""
        policy, reported = super().__call__(token)
        return policy, {**reported, **self._bounds(token)}

    def _bounds(self, token: AtToken) -> dict[str, Any]:
        return {name: token.marks[name] for name in ("clip_low", "clip_high")}
