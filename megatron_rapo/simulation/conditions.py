"""What disturbs a simulated run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rapo.errors import RapoError


@dataclass(frozen=True)
class Conditions:
    """Stragglers and failures; by default there are none.

    Attributes:
        seed: of all that is drawn.
        stragglers: share of a step's ranks, and of a round's engines, that are slow in it.
        straggler_factor: how many times as long they take.
        engine_mtbf_s: mean seconds until an engine fails, from its start or return; None: none fails.
        engine_restart_s: from the publication that finds an engine lost until it can have weights again.

    Raises:
        RapoError: a value is none that can be, or has no effect.
    """

    seed: int = 0
    stragglers: float = 0.0
    straggler_factor: float = 2.0
    engine_mtbf_s: float | None = None
    engine_restart_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.stragglers <= 1:
            raise RapoError(f"--stragglers {self.stragglers:g} is no share; give a number from 0 to 1")
        if not self.straggler_factor > 1:
            raise RapoError(
                f"--straggler-factor {self.straggler_factor:g} makes nothing slower; give more than 1"
            )
        if self.engine_mtbf_s is not None and not self.engine_mtbf_s > 0:
            raise RapoError(
                f"--engine-mtbf {self.engine_mtbf_s / 3600:g} is no time between failures; give hours above 0"
            )
        if not self.engine_restart_s > 0:
            raise RapoError(f"--engine-restart {self.engine_restart_s:g} is no time; give seconds above 0")
