"""What pulls the policy towards the reference: one value a token, whose gradient autograd takes.

With ρ = p / π, p the flattened and q the plain reference at the sampled token, w = π / π_old, H π's entropy:

    forward_exact     Σ p (log p − log π)        π − p reaches the logits, no sampling noise
    forward_sampled   w (ρ log ρ − ρ + 1)        w (1 − ρ) ∇log π: expectation ∇KL(p ‖ π), off-policy too
    forward_printed   ρ log ρ − ρ + 1            −ρ log ρ ∇log π: expectation ∇ ½ E_p[log² ρ], not the forward
                                                 KL's; as arXiv 2510.03865 prints it, for replication
    reverse_exact     Σ π (log π − log q)
    reverse_flattened Σ π (log π − log p) = φ · reverse_exact − (1 − φ) H + φ log q − log p, exact as well:
                      φ log q − log p is the normaliser of p ∝ q^φ, whatever was sampled
    k1, k2, k3        log π/q, ½ log² π/q, q/π − log q/π − 1 (http://joschu.net/blog/kl-approx.html);
                      k3's gradient is the forward KL's, on-policy
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_rapo.methods.terms.term import OF_ITS_DISTRIBUTION, AtToken, Need, Term, present

if TYPE_CHECKING:
    from torch import Tensor

FlattenedKind = Literal["forward_exact", "forward_sampled", "forward_printed", "reverse_flattened"]
ReverseKind = Literal["k1", "k2", "k3", "reverse_exact"]

# Beyond, one token would rule the minibatch.
LOG_RATIO_BOUNDS = (-10.0, math.log(10.0))


def log_ratio(reference_log_prob: Tensor, log_prob: Tensor) -> Tensor:
    """log ρ, clamped to LOG_RATIO_BOUNDS."""
    return (reference_log_prob - log_prob).clamp(*LOG_RATIO_BOUNDS)


def _printed(t: AtToken) -> Tensor:
    log_rho = log_ratio(present(t.flattened_log_prob), t.log_prob)
    rho = log_rho.exp()
    return rho * log_rho - rho + 1.0


def _sampled(t: AtToken) -> Tensor:
    return (t.log_prob - t.old_log_prob).exp() * _printed(t)


def _k1(t: AtToken) -> Tensor:
    return -log_ratio(present(t.reference_log_prob), t.log_prob)


def _k2(t: AtToken) -> Tensor:
    return 0.5 * log_ratio(present(t.reference_log_prob), t.log_prob).square()


def _k3(t: AtToken) -> Tensor:
    log_rho = log_ratio(present(t.reference_log_prob), t.log_prob)
    return log_rho.exp() - log_rho - 1.0


def _reverse_flattened(t: AtToken) -> Tensor:
    normaliser = t.phi * present(t.reference_log_prob) - present(t.flattened_log_prob)
    return t.phi * present(t.reverse_kl) - (1.0 - t.phi) * t.entropy + normaliser


DIVERGENCES: Mapping[FlattenedKind | ReverseKind, tuple[frozenset[Need], Callable[[AtToken], Tensor]]] = {
    "forward_exact": (frozenset({Need.FORWARD_KL}), lambda t: present(t.forward_kl)),
    "forward_sampled": (frozenset({Need.FLATTENED_LOG_PROB}), _sampled),
    "forward_printed": (frozenset({Need.FLATTENED_LOG_PROB}), _printed),
    "reverse_flattened": (
        frozenset({Need.REVERSE_KL, Need.REFERENCE_LOG_PROB, Need.FLATTENED_LOG_PROB}),
        _reverse_flattened,
    ),
    "reverse_exact": (frozenset({Need.REVERSE_KL}), lambda t: present(t.reverse_kl)),
    "k1": (frozenset({Need.REFERENCE_LOG_PROB}), _k1),
    "k2": (frozenset({Need.REFERENCE_LOG_PROB}), _k2),
    "k3": (frozenset({Need.REFERENCE_LOG_PROB}), _k3),
}
"""What each reads of the reference, and its value."""


@dataclass(frozen=True)
class Divergence(Term):
    """One of DIVERGENCES."""

    kind: FlattenedKind | ReverseKind

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """What the kind reads of the reference."""
        return DIVERGENCES[self.kind][0]

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `divergence`; a sampled one also the share of tokens whose log ρ was clamped."""
        needs, value = DIVERGENCES[self.kind]
        divergence = value(token)
        reported = {"divergence": divergence}
        if not needs & OF_ITS_DISTRIBUTION:
            [need] = needs
            log_rho = present(getattr(token, need.value)) - token.log_prob
            low, high = LOG_RATIO_BOUNDS
            reported["log_ratio_clamped"] = (log_rho < low) | (log_rho > high)
        return divergence, reported
