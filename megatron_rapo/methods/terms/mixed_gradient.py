"""The policy gradient of responses of which the policy sampled some, and others guided it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rapo.methods.terms.policy_gradient import PolicyGradient
from megatron_rapo.methods.terms.term import AtToken, Need, Term

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MixedGradient(Term):
    """The surrogate where the policy sampled; elsewhere −f(x) A, f(x) = x / (x + γ) (arXiv 2504.14945).

    f's gradient, γ x / (x + γ)² · ∇log π, is largest at x = γ: what the policy finds improbable is learnt the
    most, where the plain ratio would hardly see it. There is no clip.

    Attributes:
        on_policy: the surrogate.
        gamma: γ.
        over_engine: x = π / μ, μ the engine's probability under the prompt that it was given; else x = π, as
            if whoever wrote the tokens had been sure of each.
    """

    on_policy: PolicyGradient
    gamma: float
    over_engine: bool = False
    reads = frozenset({"off_policy"})

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """What the surrogate reads."""
        return self.on_policy.needs

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `policy`, and the share of `clipped` tokens."""
        policy, reported = self.on_policy(token)
        log_ratio = token.log_prob - token.engine_log_prob if self.over_engine else token.log_prob
        x = log_ratio.exp()
        shaped = -token.advantage.to(x.dtype) * x / (x + self.gamma)
        guided = token.marks["off_policy"] > 0
        policy = shaped.where(guided, policy)
        return policy, {"policy": policy, "clipped": reported["clipped"] & ~guided}
