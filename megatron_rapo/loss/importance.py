"""The correction for engines whose log-probs differ from the trainer's."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


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
