"""How long things take in a simulated run: as planned, corrected by what a real run took."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_rapo.planning.engine_cost import EngineModel, EngineSplit
from megatron_rapo.planning.plan import Planned, Planner
from megatron_rapo.planning.trainer_cost import TrainerCost

_CONTEXT = 64  # tokens of context that count as the same
_UNBOUNDED = 1 << 40


@dataclass(frozen=True)
class Corrected:
    """Of a phase: so many times what is planned, and seconds where nothing is."""

    times: float = 1.0
    more_s: float = 0.0

    def of(self, planned: float) -> float:
        """Seconds of the phase."""
        return self.times * planned + self.more_s


@dataclass(frozen=True)
class Correction:
    """How long each takes beside what is planned.

    Attributes:
        engines: how many times as long they sample.
        annotate, update, publish: of the phases.
        other_s: seconds of a step beside all phases, above the profile's.
        source: the run that it was measured in; None: there is none.
    """

    engines: float = 1.0
    annotate: Corrected = Corrected()
    update: Corrected = Corrected()
    publish: Corrected = Corrected()
    other_s: float = 0.0
    source: str | None = None


class PlannedRates:
    """An engine's (`engine.Rates`)."""

    def __init__(self, model: EngineModel, split: EngineSplit, factor: float) -> None:
        self._model, self._split, self._factor = model, split, factor
        self._decode: dict[tuple[int, int], float] = {}
        self._prefill: dict[tuple[int, float], float] = {}

    def decode_s(self, batch: int, context: float) -> float:
        """Of a token of each of so many responses."""
        key = batch, int(context) // _CONTEXT
        if (known := self._decode.get(key)) is None:
            mean = (key[1] + 0.5) * _CONTEXT
            known = self._factor * self._model.decode_s(self._split, batch, mean)
            self._decode[key] = known
        return known

    def prefill_s(self, contexts: int, tokens: float) -> float:
        """Of so many contexts of so many tokens."""
        key = contexts, tokens
        if (known := self._prefill.get(key)) is None:
            known = self._factor * self._model.prefill_s(self._split, contexts, tokens)
            self._prefill[key] = known
        return known


@dataclass(frozen=True)
class Seconds:
    """Of one way to run.

    Attributes:
        planner: that made it.
        way: the layout.
        correction: of what is planned.
    """

    planner: Planner
    way: Planned
    correction: Correction = Correction()

    @cached_property
    def rates(self) -> PlannedRates:
        """Of an engine."""
        return PlannedRates(self.planner.engine_model, self.way.split, self.correction.engines)

    @property
    def one_at_a_time(self) -> bool:
        """Whether engines serve one request after the other."""
        return self.planner.engine_model.batch is not None

    @property
    def room(self) -> int:
        """Most responses that decode together in an engine."""
        if self.one_at_a_time:  # a request is a batch
            return _UNBOUNDED
        taken = (
            self.planner.trainer_memory.beside_engines_gib(self.way.layout)
            if self.way.division.colocated
            else 0.0
        )
        return max(1, int(self.planner.engine_model.room(self.way.split, taken)))

    @property
    def verifications_per_s(self) -> float:
        """Of all heads' verifiers together."""
        workers = self.planner.config.reward.workers * self.way.layout.parallel.data_parallel
        return workers * self.planner.profile.verifications_per_s

    @property
    def publish_s(self) -> float:
        """Of a publication."""
        return self.correction.publish.of(self.way.publish_s)

    @property
    def other_s(self) -> float:
        """Of a step, beside all phases."""
        return self.planner.profile.step_s + self.correction.other_s

    def trainer(self, mean_tokens: float) -> TrainerCost:
        """Of a step whose responses have so many tokens in the mean."""
        load = replace(self.planner.workload, response_tokens=mean_tokens)
        cost = replace(self.planner, workload=load).cost(self.way.layout)
        return replace(
            cost,
            annotate=self.correction.annotate.of(cost.annotate),
            update=self.correction.update.of(cost.update),
        )
