"""The memory of a trainer's rank under thousands of layouts, of which each part is estimated once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rapo.config import RunConfig
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.planning.layouts import TrainerLayout
from megatron_rapo.planning.remembered import remembered_by
from megatron_rapo.scaling.memory import GIB, MemoryEstimate, estimate_held, estimate_working


def _of_held(layout: TrainerLayout) -> tuple[int, ...]:
    one = layout.parallel
    return (
        *(one.tensor_parallel, one.pipeline_parallel, one.context_parallel, one.data_parallel),
        *(one.sequence_parallel, one.expert_parallel, one.expert_tensor_parallel),
    )


def _of_working(layout: TrainerLayout) -> tuple[int | str, ...]:
    one = layout.parallel
    return (
        *(one.tensor_parallel, one.pipeline_parallel, one.context_parallel, one.sequence_parallel),
        *(one.expert_tensor_parallel, layout.budget, layout.recompute),
    )


@dataclass(frozen=True)
class TrainerMemory:
    """Of one configuration's model."""

    config: RunConfig
    architecture: Architecture

    def estimate(self, layout: TrainerLayout) -> MemoryEstimate:
        """Of a rank of this layout."""
        activations, loss = self._working(layout)
        return replace(self._held(layout)[0], activations=activations, loss=loss)

    def total(self, layout: TrainerLayout) -> int:
        """Bytes of that estimate."""
        activations, loss = self._working(layout)
        return self._held(layout)[1] + activations + loss

    def beside_engines_gib(self, layout: TrainerLayout) -> float:
        """What a rank holds while colocated engines sample."""
        held, _ = self._held(layout)
        kept = held.weights + held.reference + held.teacher
        if not self.config.optimizer.in_host_memory_during_rollouts:
            kept += held.gradients + held.optimizer
        return kept / GIB

    @remembered_by(_of_held)
    def _held(self, layout: TrainerLayout) -> tuple[MemoryEstimate, int]:
        """What does not depend on microbatches, and its sum."""
        held = estimate_held(self._laid_out(layout), self.architecture)
        return held, held.total

    @remembered_by(_of_working)
    def _working(self, layout: TrainerLayout) -> tuple[int, int]:
        """Activations and the loss, which do not depend on DP and EP."""
        return estimate_working(self._laid_out(layout), self.architecture)

    def _laid_out(self, layout: TrainerLayout) -> RunConfig:
        """The configuration under a layout, not validated again."""
        config = self.config
        algorithm = config.algorithm.model_copy(update={"max_tokens_per_microbatch": layout.budget})
        model = config.model.model_copy(update={"recompute": layout.recompute})
        return config.model_copy(update={"parallel": layout.parallel, "algorithm": algorithm, "model": model})
