"""Finds the layouts of a run that fit, and ranks them by the time of a step."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.planning.engine_cost import EngineModel, EngineSplit
from megatron_rapo.planning.layouts import (
    Division,
    TrainerLayout,
    divisions,
    engine_splits,
    trainer_layouts,
)
from megatron_rapo.planning.profile import Profile
from megatron_rapo.planning.trainer_cost import TrainerCost, TrainerModel
from megatron_rapo.planning.trainer_memory import TrainerMemory
from megatron_rapo.planning.workload import Workload
from megatron_rapo.scaling.memory import GIB, MemoryEstimate

USABLE = 0.9  # of a device's memory; the rest is the allocator's, CUDA's and NCCL's
_KEPT = 50  # of the fastest layouts of each division
_MOST_TIMES = 64  # as many devices are tried, where none fits


@dataclass(frozen=True)
class Planned:
    """One way to run: layout, engines, seconds of a step by phase, and a trainer rank's memory."""

    division: Division
    layout: TrainerLayout
    split: EngineSplit
    max_staleness: int
    rollout_s: float
    reward_s: float
    publish_s: float
    other_s: float
    trainer: TrainerCost
    memory: MemoryEstimate

    @property
    def step_s(self) -> float:
        """Of a step: all phases, or the longer of sampling and training where engines sample ahead."""
        beside = self.trainer.total + self.reward_s + self.other_s
        return _step_s(self.rollout_s, beside, self.publish_s, self.max_staleness)


def _step_s(rollout: float, beside: float, publish: float, max_staleness: int) -> float:
    return (max(rollout, beside) if max_staleness else rollout + beside) + publish


class _Draft(NamedTuple):
    """What is known of a way when its time is: most are no longer of interest then."""

    step_s: float
    layout: TrainerLayout
    split: EngineSplit
    max_staleness: int
    rollout_s: float
    trainer: TrainerCost


class _Fastest:
    """So many of the fastest; of equal ones those that came first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[float, int, _Draft]] = []  # the slowest and latest first
        self._come = 0

    @property
    def limit(self) -> float:
        """Seconds of a step from which on nothing is kept any more."""
        return -self._heap[0][0] if len(self._heap) == self._most else math.inf

    def add(self, draft: _Draft) -> None:
        """Keeps it, if it is fast enough."""
        self._come += 1
        heapq.heappush(self._heap, (-draft.step_s, -self._come, draft))
        if len(self._heap) > self._most:
            heapq.heappop(self._heap)

    def in_order(self) -> list[_Draft]:
        """Those that are kept, fastest first."""
        return [draft for _, _, draft in sorted(self._heap, reverse=True)]


@dataclass
class Plan:
    """Ways that fit, fastest first, and how many do not for which reason."""

    found: list[Planned] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Planner:
    """Plans one configuration for one kind of device."""

    config: RunConfig
    architecture: Architecture
    workload: Workload
    profile: Profile

    def __post_init__(self) -> None:
        if self.architecture.experts is not None and not self.config.engine_kind.takes_experts:
            raise RapoError(
                f'rollout.engine.kind = "{self.config.rollout.engine.kind}" takes no new weights of '
                f"experts, which the model of {self.config.model.path} has; choose another kind"
            )
        if self.config.model.dtype != self.profile.dtype:
            raise RapoError(
                f'model.dtype = "{self.config.model.dtype}", but the profile of {self.profile.device} has '
                f"rates of {self.profile.dtype}; name one of that type, or calibrate with --dtype"
            )

    def plan(self, devices: int) -> Plan:
        """All ways to run on so many devices.

        Raises:
            RapoError: none divides them, or none fits; the message has the smallest change that would.
        """
        plan = self._plan(devices)
        if not plan.found:
            raise RapoError(self._nothing(devices, plan))
        return plan

    def _plan(self, devices: int) -> Plan:
        plan = Plan()
        node = self.profile.devices_per_node
        for division in divisions(devices, node, colocated=self.config.slurm is None):
            plan.found += [self._planned(division, *draft[1:]) for draft in self._fastest_of(division, plan)]
        plan.found.sort(key=lambda way: (way.step_s, way.memory.total))
        return plan

    def _fastest_of(self, division: Division, plan: Plan) -> list[_Draft]:
        """The trainer's layouts and the engines' splits do not know each other, unless they are colocated.

        A layout is not priced where sampling alone takes as long as the slowest that is kept.
        """
        fastest, rejected = _Fastest(_KEPT), plan.rejected
        engines, stalenesses = self._engines(division), self._stalenesses(division)
        publish = self._publish_s(division)
        apart = self._fastest(engines, 0.0) if not division.colocated else None
        for layout in self._fitting(division.trainer, rejected):
            sampled = apart
            if division.colocated:
                sampled = self._fastest(engines, self.trainer_memory.beside_engines_gib(layout))
            if sampled is None:
                rejected["engines have no room for the weights and one response"] += 1
                continue
            split, rollout = sampled
            if rollout + publish >= fastest.limit:
                continue
            trainer = self.cost(layout)
            beside = trainer.total + self._reward_s(layout, rollout) + self.profile.step_s
            for staleness in stalenesses:
                step = _step_s(rollout, beside, publish, staleness)
                fastest.add(_Draft(step, layout, split, staleness, rollout, trainer))
        return fastest.in_order()

    def _stalenesses(self, division: Division) -> tuple[int, ...]:
        """What `rollout.max_staleness` may be; partial responses need as much as is configured."""
        if self.config.rollout.partial_tokens is not None:
            return () if division.colocated else (self.config.rollout.max_staleness,)
        return (0,) if division.colocated else (0, 1)

    def _planned(
        self,
        division: Division,
        layout: TrainerLayout,
        split: EngineSplit,
        staleness: int,
        rollout: float,
        trainer: TrainerCost,
    ) -> Planned:
        return Planned(
            division=division,
            layout=layout,
            split=split,
            max_staleness=staleness,
            rollout_s=rollout,
            reward_s=self._reward_s(layout, rollout),
            publish_s=self._publish_s(division),
            other_s=self.profile.step_s,
            trainer=trainer,
            memory=self.trainer_memory.estimate(layout),
        )

    def _reward_s(self, layout: TrainerLayout, rollout: float) -> float:
        """Of judging, as far as it ends after sampling: responses are judged while others are sampled."""
        judges = self.config.reward.workers * layout.parallel.data_parallel
        return max(0.0, self.workload.responses / judges / self.profile.verifications_per_s - rollout)

    def _publish_s(self, division: Division) -> float:
        devices = division.trainer if division.colocated else division.trainer + division.engines
        return self.engine_model.publish_s(devices, over_disk=self.transport(division) == "disk")

    def predict(
        self, division: Division, layout: TrainerLayout, split: EngineSplit, max_staleness: int
    ) -> Planned:
        """Of one given way, whether or not its trainer fits.

        Raises:
            RapoError: engines have no room for the weights and one response.
        """
        taken = self.trainer_memory.beside_engines_gib(layout) if division.colocated else 0.0
        rollout = self.engine_model.rollout_s(split, taken)
        if rollout is None:
            raise RapoError(
                f"{split.engines} engines of {split.tensor_parallel} devices have no room for weights and a "
                "response; raise rollout.engine.tensor_parallel"
            )
        return self._planned(division, layout, split, max_staleness, rollout, self.cost(layout))

    def transport(self, division: Division) -> str:
        """`weights.transport`: colocated engines take no broadcast, and handles reach one machine alone."""
        configured = self.config.weights.transport
        if not division.colocated or configured in ("tensor", "disk"):
            return configured
        return "tensor" if division.trainer <= self.profile.devices_per_node else "disk"

    def _fitting(self, ranks: int, rejected: Counter[str]) -> Iterator[TrainerLayout]:
        """The trainer's layouts that divide and have room."""
        room = USABLE * self.profile.memory_gib * GIB
        for layout in trainer_layouts(self.config, self.architecture, ranks, self.profile.devices_per_node):
            if isinstance(layout, str):
                rejected[layout] += 1
            elif self.trainer_memory.total(layout) > room:
                rejected[
                    f"a trainer rank has no room in {self.profile.memory_gib:g} GiB "
                    f"(recompute {layout.recompute})"
                ] += 1
            else:
                yield layout

    def cost(self, layout: TrainerLayout) -> TrainerCost:
        """Of a step under this layout."""
        optimizer = self.config.optimizer
        return self.trainer_model.cost(
            layout.parallel,
            layout.budget,
            recompute=layout.recompute == "full",
            distributed=optimizer.distributed,
            overlap=optimizer.overlap_communication,
        )

    def _engines(self, division: Division) -> list[EngineSplit]:
        most = 1 if self._one_request_at_a_time else self.profile.devices_per_node
        return engine_splits(self.architecture, division.engines, self.profile.devices_per_node, most)

    def _fastest(self, splits: list[EngineSplit], taken_gib: float) -> tuple[EngineSplit, float] | None:
        """The split that samples a step's responses first; None where none has room."""
        timed = [(split, self.engine_model.rollout_s(split, taken_gib)) for split in splits]
        possible = [(split, seconds) for split, seconds in timed if seconds is not None]
        return min(possible, key=lambda one: one[1], default=None)

    @cached_property
    def trainer_memory(self) -> TrainerMemory:
        """The memory of the trainer's ranks."""
        return TrainerMemory(self.config, self.architecture)

    @cached_property
    def trainer_model(self) -> TrainerModel:
        """The seconds of the trainer's work."""
        return TrainerModel(
            self.architecture, self.workload, self.profile, self._element, self.config.adapter
        )

    @cached_property
    def engine_model(self) -> EngineModel:
        """The seconds of the engines' work."""
        rollout = self.config.rollout
        together = rollout.prompts_per_request * rollout.responses_per_prompt
        batch = together if self._one_request_at_a_time else None
        return EngineModel(self.architecture, self.workload, self.profile, self._element, batch)

    @property
    def _one_request_at_a_time(self) -> bool:
        """As embedded servers do, and kinds of a user's own that say so."""
        return bool(getattr(self.config.engine_kind.connect, "one_request_at_a_time", False))

    @property
    def _element(self) -> int:
        return 2 if self.config.model.dtype == "bfloat16" else 4

    def _nothing(self, devices: int, plan: Plan) -> str:
        """Why nothing runs on so many devices, and what would."""
        most = plan.rejected.most_common(3)
        reasons = (
            "; ".join(f"{count} × {reason}" for reason, count in most) or "too few for trainer and engines"
        )
        return f"no layout of {devices} devices of {self.profile.device} fits: {reasons}. " + self._remedy(
            devices
        )

    def _remedy(self, devices: int) -> str:
        """The smallest change that fits: an option, then fewer devices that divide, then more."""
        for told, config in self._thriftier():
            if replace(self, config=config)._plan(devices).found:
                return f"Set {told}, and it fits"
        for other in self._other_counts(devices):
            if self._plan(other).found:
                return f"It fits on {other} devices (--gpus {other})"
        return (
            f"Not on {_MOST_TIMES * devices} either: lower rollout.max_response_tokens = "
            f"{self.config.rollout.max_response_tokens}, or choose a smaller model"
        )

    def _other_counts(self, devices: int) -> Iterator[int]:
        """A few less, which may divide; then multiples, which have more room; then parts."""
        yield from range(devices - 1, max(1, devices - self.profile.devices_per_node), -1)
        doublings = range(1, _MOST_TIMES.bit_length())
        yield from (devices << number for number in doublings)
        yield from (devices >> number for number in doublings if devices >> number)

    def _thriftier(self) -> Iterator[tuple[str, RunConfig]]:
        config = self.config
        own_reference = config.adapter is None or config.model.reference_path is not None
        if self.workload.reference and own_reference and not config.model.reference_in_host_memory:
            model = config.model.model_copy(update={"reference_in_host_memory": True})
            yield "model.reference_in_host_memory = true", config.model_copy(update={"model": model})
        chunk = config.algorithm.loss_chunk_tokens
        if chunk > 256:
            algorithm = config.algorithm.model_copy(update={"loss_chunk_tokens": 256})
            yield "algorithm.loss_chunk_tokens = 256", config.model_copy(update={"algorithm": algorithm})
