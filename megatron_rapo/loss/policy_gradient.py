"""The clipped policy-gradient term, and the correction for engines whose log-probs differ."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """Per token, `[tokens]`: what to maximise, and whether a clip took its gradient away."""

    value: Tensor
    clipped: Tensor


def clipped_surrogate(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_dual: float | None = None,
) -> Surrogate:
    """min(w A, clip(w, 1 − clip_low, 1 + clip_high) A), w = exp(log_ratio) (PPO, arXiv 1707.06347, eq. 7).

    With `clip_dual` = c, the surrogate of a negative advantage is at least c A (arXiv 1912.09729).
    """
    ratio = log_ratio.exp()
    advantages = advantages.to(ratio.dtype)
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    unclipped, limited = ratio * advantages, bounded * advantages
    value, clipped = unclipped.minimum(limited), limited < unclipped
    if clip_dual is not None:
        floor = clip_dual * advantages
        dropped = (advantages < 0) & (value < floor)
        value, clipped = torch.where(dropped, floor, value), clipped | dropped
    return Surrogate(value, clipped)


def with_sequence_value(log_prob: Tensor, sequence_log_ratio: Tensor) -> Tensor:
    """A token's log-ratio that is its response's in value, and its own in gradient (GSPO, arXiv 2507.18071).

    With every token of a response weighted alike, the sum over tokens then has the gradient of the mean.
    """
    return sequence_log_ratio + log_prob - log_prob.detach()


def importance_weight(
    log_prob: Tensor, engine_log_prob: Tensor, correction: Literal["off", "truncated", "masked"], cap: float
) -> Tensor:
    """The constant weight of a token's policy gradient for having been sampled by another policy.

    Args:
        log_prob: `[tokens]`, the trainer's, of the policy that sampled.
        engine_log_prob: `[tokens]`, as the engine reported it.
        correction: `truncated`: min(u, cap), u = trainer / engine probability (TIS); `masked`: 1 where
            1 / cap ≤ u ≤ cap, else 0; `off`: 1.
        cap: greater than 1.
    """
    ratio = (log_prob - engine_log_prob).exp()
    if correction == "truncated":
        return ratio.clamp(max=cap)
    if correction == "masked":
        return ((ratio <= cap) & (ratio >= 1.0 / cap)).to(ratio.dtype)
    return torch.ones_like(ratio)
