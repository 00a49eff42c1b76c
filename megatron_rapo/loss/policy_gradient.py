"""The clipped policy-gradient term."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ClippedSurrogate(NamedTuple):
    """Per token, `[tokens]`: the surrogate to maximise, and whether the clip took its gradient away."""

    value: Tensor
    clipped: Tensor


def clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> ClippedSurrogate:
    """min(w A, clip(w, 1 − clip_low, 1 + clip_high) A) with w = π / π_old (PPO, arXiv 1707.06347, eq. 7)."""
    ratio = (log_probs - old_log_probs).exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    unclipped, limited = ratio * advantages, bounded * advantages
    return ClippedSurrogate(unclipped.minimum(limited), limited < unclipped)
