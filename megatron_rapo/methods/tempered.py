"""Options of methods that hold the entropy by a temperature other than the rollouts'."""

from __future__ import annotations

from pydantic import Field

from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.section import PositiveFloat


class Tempered(Clipping):
    """T = T_high where the entropy H is at most H0, else T_low."""

    target_entropy: PositiveFloat = Field(description="H0, in nats.")
    high_temperature: float = Field(
        1.2, gt=1, allow_inf_nan=False, description="T_high, in multiples of the rollouts' temperature."
    )
    low_temperature: float = Field(0.8, gt=0, lt=1, description="T_low, likewise.")

    def against(self, entropy: float) -> float:
        """The temperature, in multiples of the rollouts', that moves the entropy towards H0."""
        return self.high_temperature if entropy <= self.target_entropy else self.low_temperature
