"""A control for RAPO, of no paper: forward against reverse KL at the same measured distance.

    J = E[ g(θ) − α_k · D ],   D = KL(π_ref ‖ π) or KL(π ‖ π_ref), exact
    α_{k+1} = α_k · exp(γ · clip(D_k / D* − 1, −1, 1))

With the same D* of the same measured divergence (`measure`), runs of both directions are as far from the
reference, and what is left between them is the direction. φ ≡ 1: the reference is not flattened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import AtToken, Need, Term, present
from megatron_rapo.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class MatchedKL(Method):
    """A forward or reverse KL whose coefficient is controlled so that a measured KL stays at a given one."""

    class Options(Clipping):
        """A control for RAPO: the direction of the KL at the same distance."""

        method: str = "matched_kl"
        direction: Literal["forward", "reverse"] = Field(
            "forward", description="D: KL(reference ‖ policy) or KL(policy ‖ reference)."
        )
        measure: Literal["forward", "reverse"] = Field(
            "reverse", description="The divergence that is held at `target`, whichever `direction` is."
        )
        target: PositiveFloat = Field(0.01, description="D*, in nats a token.")
        divergence_coefficient: PositiveFloat = Field(5e-3, description="α of the first step.")
        gain: PositiveFloat = Field(0.1, description="γ: α grows at most by e^γ a step.")

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self.coefficient = options.divergence_coefficient

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate()), (self.coefficient, BothKLs(self.options.direction))]

    def learn(self, measured: Mapping[str, float]) -> None:
        apart = measured[f"loss/{self.options.measure}_kl"] / self.options.target - 1.0
        self.coefficient *= math.exp(self.options.gain * min(max(apart, -1.0), 1.0))

    def metrics(self) -> Mapping[str, float]:
        """α of the next step."""
        return {"divergence_coefficient": self.coefficient}

    def state(self) -> Any:
        return {"coefficient": self.coefficient}

    def restore(self, state: Any) -> None:
        self.coefficient = state["coefficient"]


@dataclass(frozen=True)
class BothKLs(Term):
    """One of both exact divergences; both are reported."""

    direction: Literal["forward", "reverse"]
    needs = frozenset({Need.FORWARD_KL, Need.REVERSE_KL})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports `forward_kl` and `reverse_kl`."""
        both = {"forward_kl": present(token.forward_kl), "reverse_kl": present(token.reverse_kl)}
        return both[f"{self.direction}_kl"], both
