"""What is known of one engine once it was examined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rapo.doctor.engines import Answer
from megatron_rapo.doctor.inference import gap
from megatron_rapo.doctor.readings import Array, Readings


@dataclass(frozen=True)
class Asked:
    """Answers beside the trainer's readings of their tokens.

    Attributes:
        answers: none with a token that the trainer does not have.
        readings: of each.
        foreign: tokens that the trainer does not have, in answers left out.
    """

    answers: Sequence[Answer]
    readings: Sequence[Readings]
    foreign: int = 0

    @property
    def reported(self) -> Array:
        """`[tokens]`, the engine's log-probs of all answers."""
        return np.concatenate([answer.log_probs for answer in self.answers])

    @property
    def joined(self) -> Readings:
        """The trainer's readings of the same tokens."""
        return Readings.joined(self.readings)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """`[tokens]`, of each in its answer."""
        return np.concatenate([np.arange(len(answer.token_ids)) for answer in self.answers])

    @property
    def greedy_gap(self) -> float:
        """Mean |Δ| at temperature 1, in nats, whether the engine takes spare rows for tokens or not.

        Infinite where no answer has only tokens that the trainer has.
        """
        if not self.answers:
            return math.inf
        readings = self.joined
        return min(gap(readings.unscaled, self.reported), gap(readings.over_all_rows, self.reported))


@dataclass(frozen=True)
class Stage:
    """Greedy answers to the same prompts, with what was cached before, and without."""

    name: str
    warm: Asked
    cold: Asked


@dataclass(frozen=True)
class Evidence:
    """Of one engine.

    Attributes:
        url: its address.
        version: of the run's weights.
        found_version: of the weights that it was found with; None: it was started for the examination.
        found: before anything was published; None as well.
        shaken: after other weights were published on purpose.
        shaken_by_fresh: the same cold answers, held against the run's weights.
        fresh: after the run's weights were published.
        continued: prompts continued from within: their beginnings were just asked, so are cached.
        sampled: responses asked for as a run does, with fresh weights and an empty cache.
        prefilled: log-probs of these responses read in one go, at temperature 1; None: it tells none.
        temperature: of `sampled`.
        tolerance: mean |Δ| that rounding may make, in nats.
    """

    url: str
    version: int
    found_version: str | None
    found: Stage | None
    shaken: Stage
    shaken_by_fresh: Asked
    fresh: Stage
    continued: Asked
    sampled: Asked
    prefilled: Sequence[Array] | None
    temperature: float
    tolerance: float

    @property
    def stages(self) -> list[Stage]:
        """In the order asked."""
        return [stage for stage in (self.found, self.shaken, self.fresh) if stage is not None]

    @property
    def agrees(self) -> bool:
        """Whether fresh greedy answers without a cache are the trainer's, but for rounding."""
        return self.fresh.cold.greedy_gap <= self.tolerance
