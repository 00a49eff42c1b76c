"""How good the sampled divergences are: bias and variance against the exact ones, on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_rapo.methods.terms.divergences import DIVERGENCES, FlattenedKind, ReverseKind
from megatron_rapo.methods.terms.term import AtToken, Need, Term, present

if TYPE_CHECKING:
    from torch import Tensor

# Each estimator, and the exact divergence that it estimates.
ESTIMATES: Mapping[FlattenedKind | ReverseKind, str] = {
    "k1": "reverse_kl",
    "k2": "reverse_kl",
    "k3": "reverse_kl",
    "forward_sampled": "forward_kl",
    "forward_printed": "forward_kl",
}


class Audit(Term):
    """Adds nothing to the loss; reports both exact divergences, and each estimator's bias and variance."""

    needs = frozenset({Need.FORWARD_KL, Need.REVERSE_KL, Need.FLATTENED_LOG_PROB, Need.REFERENCE_LOG_PROB})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports both exact divergences, and each estimator's error and its square."""
        exact = {"forward_kl": present(token.forward_kl), "reverse_kl": present(token.reverse_kl)}
        reported = dict(exact)
        for name, estimated in ESTIMATES.items():
            error = DIVERGENCES[name][1](token) - exact[estimated]
            reported[f"{name}_error"], reported[f"{name}_square"] = error, error.square()
        return token.log_prob.new_zeros(token.log_prob.shape), reported

    def metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """`audit/forward_kl`, `audit/reverse_kl`, and `audit/<estimator>_bias` and `…_variance`."""
        metrics = {f"audit/{name}": means[name] for name in ("forward_kl", "reverse_kl")}
        for name in ESTIMATES:
            bias = means[f"{name}_error"]
            metrics[f"audit/{name}_bias"] = bias
            metrics[f"audit/{name}_variance"] = max(means[f"{name}_square"] - bias**2, 0.0)
        return metrics
