"""What pulls the policy towards the reference."""

from __future__ import annotations

import torch
from torch import Tensor


def flattening(rewards: Tensor, floor: float) -> Tensor:
    """φ(r) = φ0 + (1 − φ0) · clip(r, 0, 1): the power that flattens the reference for a response's reward.

    Args:
        rewards: any shape.
        floor: φ0 in [0, 1]; a failed response has φ = φ0, a correct one φ = 1.
    """
    return floor + (1.0 - floor) * rewards.clamp(0.0, 1.0)


def k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """The sampled estimate ρ − log ρ − 1 of KL(π ‖ π_ref), ρ = π_ref / π (http://joschu.net/blog/kl-approx.html).

    log ρ is clamped to [−10, log 10]: beyond, one token would rule the minibatch.
    """
    log_ratio = (reference_log_probs - log_probs).clamp(-10.0, float(torch.tensor(10.0).log()))
    return log_ratio.exp() - log_ratio - 1.0
