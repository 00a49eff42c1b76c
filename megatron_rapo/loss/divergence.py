"""What pulls the policy towards the reference: one value a token, whose gradient autograd takes.

The table `DIVERGENCES` says of each mode what it needs of the reference. With ρ = p / π, p the flattened and
q the plain reference at the sampled token, w = π / π_old:

    forward_exact     Σ p (log p − log π)        π − p reaches the logits, no sampling noise
    forward_sampled   w (ρ log ρ − ρ + 1)        w (1 − ρ) ∇log π: expectation ∇KL(p ‖ π), off-policy too
    forward_printed   ρ log ρ − ρ + 1            −ρ log ρ ∇log π: expectation ∇ ½ E_p[log² ρ], not the forward
                                                 KL's; as arXiv 2510.03865 prints it, for replication
    reverse_exact     Σ π (log π − log q)
    k1, k2, k3        log π/q, ½ log² π/q, q/π − log q/π − 1 (http://joschu.net/blog/kl-approx.html);
                      k3's gradient is the forward KL's, on-policy
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

# Beyond, one token would rule the minibatch.
LOG_RATIO_BOUNDS = (-10.0, math.log(10.0))


class Needs(Enum):
    """What a divergence reads of the reference."""

    NOTHING = "nothing"
    FORWARD = "its distribution, flattened"
    REVERSE = "its distribution"
    FLATTENED_LOG_PROB = "the sampled token's flattened log-prob"
    LOG_PROB = "the sampled token's log-prob"


class AtToken(NamedTuple):
    """What a divergence is made of, each `[tokens]`; those not needed may be None.

    Attributes:
        log_prob: log π of the sampled token, differentiable.
        old_log_prob: log π_old of it.
        forward_kl, reverse_kl: exact, differentiable.
        flattened_log_prob, reference_log_prob: log p and log q of the sampled token.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    forward_kl: Tensor | None
    reverse_kl: Tensor | None
    flattened_log_prob: Tensor | None
    reference_log_prob: Tensor | None


def flattening(rewards: Tensor, floor: float) -> Tensor:
    """φ(r) = φ0 + (1 − φ0) · clip(r, 0, 1): the power that flattens the reference for a response's reward.

    Args:
        rewards: any shape.
        floor: φ0 in [0, 1]; a failed response has φ = φ0, a correct one φ = 1.
    """
    return floor + (1.0 - floor) * rewards.clamp(0.0, 1.0)


def log_ratio(reference_log_prob: Tensor, log_prob: Tensor) -> Tensor:
    """log ρ, clamped to LOG_RATIO_BOUNDS."""
    return (reference_log_prob - log_prob).clamp(*LOG_RATIO_BOUNDS)


def _present(value: Tensor | None) -> Tensor:
    assert value is not None, "the batch lacks the reference's annotation that this divergence needs"
    return value


def _printed(t: AtToken) -> Tensor:
    log_rho = log_ratio(_present(t.flattened_log_prob), t.log_prob)
    rho = log_rho.exp()
    return rho * log_rho - rho + 1.0


def _sampled(t: AtToken) -> Tensor:
    return (t.log_prob - t.old_log_prob).exp() * _printed(t)


def _k1(t: AtToken) -> Tensor:
    return -log_ratio(_present(t.reference_log_prob), t.log_prob)


def _k2(t: AtToken) -> Tensor:
    return 0.5 * log_ratio(_present(t.reference_log_prob), t.log_prob).square()


def _k3(t: AtToken) -> Tensor:
    log_rho = log_ratio(_present(t.reference_log_prob), t.log_prob)
    return log_rho.exp() - log_rho - 1.0


DIVERGENCES: Mapping[str, tuple[Needs, Callable[[AtToken], Tensor]]] = {
    "none": (Needs.NOTHING, lambda t: torch.zeros_like(t.log_prob)),
    "forward_exact": (Needs.FORWARD, lambda t: _present(t.forward_kl)),
    "forward_sampled": (Needs.FLATTENED_LOG_PROB, _sampled),
    "forward_printed": (Needs.FLATTENED_LOG_PROB, _printed),
    "reverse_exact": (Needs.REVERSE, lambda t: _present(t.reverse_kl)),
    "k1": (Needs.LOG_PROB, _k1),
    "k2": (Needs.LOG_PROB, _k2),
    "k3": (Needs.LOG_PROB, _k3),
}
