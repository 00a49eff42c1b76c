"""How good the sampled divergences are: bias and variance against the exact ones, on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_rapo.loss.divergence import DIVERGENCES, AtToken

# Each estimator, and the exact divergence that it estimates.
ESTIMATES = {
    "k1": "reverse_kl",
    "k2": "reverse_kl",
    "k3": "reverse_kl",
    "forward_sampled": "forward_kl",
    "forward_printed": "forward_kl",
}
AUDIT_PARTS = (
    "forward_kl",
    "reverse_kl",
    *(f"{name}_{moment}" for name in ESTIMATES for moment in ("error", "square")),
)


def audit_parts(at_token: AtToken) -> dict[str, Tensor]:
    """Per token `[tokens]`: both exact divergences, and each estimator's error and its square."""
    exact = {"forward_kl": at_token.forward_kl, "reverse_kl": at_token.reverse_kl}
    parts: dict[str, Tensor] = {name: value for name, value in exact.items() if value is not None}
    for name, estimated in ESTIMATES.items():
        error = DIVERGENCES[name][1](at_token) - parts[estimated]
        parts[f"{name}_error"], parts[f"{name}_square"] = error, error.square()
    return parts


def audit_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """Metrics from the parts' means: the exact divergences, each estimator's bias and variance."""
    metrics = {f"audit/{name}": means[name] for name in ("forward_kl", "reverse_kl")}
    for name in ESTIMATES:
        bias = means[f"{name}_error"]
        metrics[f"audit/{name}_bias"] = bias
        metrics[f"audit/{name}_variance"] = max(means[f"{name}_square"] - bias**2, 0.0)
    return metrics
