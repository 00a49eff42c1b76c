"""Process groups of the layout, and where this rank stands in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_rapo.config import Parallel
from megatron_rapo.megatron_repairs.install import install
from megatron_rapo.parallel.device import choose_device, communication_backend

T = TypeVar("T")


@dataclass(frozen=True)
class Placement:
    """This rank's coordinates and groups. Ranks are ordered TP fastest, then CP, DP, PP.

    Attributes:
        layout: sizes of all dimensions.
        rank: global rank.
        tensor_rank, pipeline_rank, context_rank, data_rank: coordinates in the layout.
        expert_tensor_rank: coordinate among the ranks that share each matrix of an expert.
        tensor_group: ranks that share each matrix.
        expert_tensor_group: ranks that share each matrix of an expert.
        pipeline_group: ranks that share the layers.
        context_group: ranks that share each sequence.
        gradient_group: DP × CP, the ranks whose gradients are summed.
        host_group: all ranks, over gloo, for objects in host memory.
        replica_group: TP × CP × PP, this replica's ranks, over gloo, its head first.
    """

    layout: Parallel
    rank: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    expert_tensor_rank: int
    tensor_group: dist.ProcessGroup
    expert_tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    gradient_group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, which logs, and publishes for all."""
        return self.rank == 0

    @property
    def is_head(self) -> bool:
        """Whether this rank fetches its replica's rollouts: the first TP, PP and CP rank of a replica."""
        return self.tensor_rank == self.pipeline_rank == self.context_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head of the model, where losses are computed."""
        return self.pipeline_rank == self.layout.pipeline_parallel - 1

    @property
    def heads(self) -> list[int]:
        """Global rank of each replica's head, by data-parallel rank."""
        return [replica_ranks(self.layout, replica)[0] for replica in range(self.layout.data_parallel)]

    def layers_of(self, count: int, stage: int | None = None) -> list[int]:
        """Numbers, from 0, of the layers of a pipeline stage's chunks; `stage` is this rank's by default."""
        stages, chunks = self.layout.pipeline_parallel, self.layout.virtual_pipeline_parallel or 1
        size = count // (stages * chunks)
        stage = self.pipeline_rank if stage is None else stage
        starts = [(chunk * stages + stage) * size for chunk in range(chunks)]
        return [start + place for start in starts for place in range(size)]

    def group_of(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """The group of these ranks, which hold a tensor between them (`weights.holders`), in their order."""
        for group in (self.tensor_group, self.expert_tensor_group):
            if dist.get_process_group_ranks(group) == list(ranks):
                return group
        raise ValueError(f"rank {self.rank} has no group with ranks {list(ranks)}")

    def share_from_heads(self, mine: T | None) -> list[T]:
        """Every head's object, by data-parallel rank, on all ranks. `mine` is read on heads only.

        Objects are pickled; they only ever come from ranks of this job.
        """
        shared: list[T] = []
        for head in self.heads:
            box = [mine if head == self.rank else None]
            dist.broadcast_object_list(box, src=head, group=self.host_group)
            assert box[0] is not None, f"head rank {head} shared nothing"
            shared.append(box[0])
        return shared

    def share_from_main(self, mine: T | None) -> T:
        """Rank 0's object on all ranks."""
        box = [mine if self.is_main else None]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]  # type: ignore[return-value]

    def share_from_all(self, mine: T) -> list[T]:
        """Every rank's object, by rank, on all ranks."""
        shared: list[T] = [mine] * self.layout.world_size
        dist.all_gather_object(shared, mine, group=self.host_group)
        return shared

    def largest(self, mine: float) -> float:
        """The largest of all ranks' values, on all ranks."""
        value = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.host_group)
        return float(value)

    def largest_of_each(self, mine: Sequence[float]) -> list[float]:
        """Likewise, of each of several values."""
        values = torch.tensor(mine, dtype=torch.float64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.host_group)
        return [float(value) for value in values]

    def sum_from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over DP × CP what the last stages hold, for all stages, in place."""
        return self._reduce_from_last_stage(values, dist.ReduceOp.SUM)

    def max_from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """The maximum over DP × CP of what the last stages hold, for all stages, in place."""
        return self._reduce_from_last_stage(values, dist.ReduceOp.MAX)

    def _reduce_from_last_stage(
        self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType
    ) -> torch.Tensor:
        if not self.is_last_stage:
            values.zero_()
        dist.all_reduce(values, operation, group=self.gradient_group)
        if self.layout.pipeline_parallel > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(values, src=last, group=self.pipeline_group)
        return values


@contextmanager
def process_groups(layout: Parallel, seed: int) -> Iterator[Placement]:
    """Joins the job's ranks into the layout's groups; leaves them on exit.

    Rank, world size and master address come from the environment that the launcher set. The world size must
    equal the layout's.
    """
    install()
    choose_device()
    # So that a hang can be told by who waits for whom (hangs/): PyTorch does it by itself for NCCL alone.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    timeout = timedelta(seconds=layout.timeout_s)
    dist.init_process_group(communication_backend(), timeout=timeout)
    try:
        yield arrange(layout, seed)
    finally:
        # After an error other ranks may hang in a collective: leaving must not wait for them.
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def arrange(layout: Parallel, seed: int) -> Placement:
    """Arranges the already joined ranks into `layout`, out of another one if they were in it.

    An earlier arrangement's groups are of no more use.
    """
    _leave_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_parallel,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        distributed_timeout_minutes=max(1, round(layout.timeout_s / 60)),
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Placement(
        layout=layout,
        rank=dist.get_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        expert_tensor_group=parallel_state.get_expert_tensor_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        gradient_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        host_group=_host_group(range(dist.get_world_size()), layout, "HOST_GROUP"),
        replica_group=_replica_group(layout),
    )


def replica_ranks(layout: Parallel, replica: int) -> list[int]:
    """Global ranks of a data-parallel replica, its head first."""
    block = layout.tensor_parallel * layout.context_parallel
    stage = block * layout.data_parallel
    starts = [stage * s + block * replica for s in range(layout.pipeline_parallel)]
    return [rank for start in starts for rank in range(start, start + block)]


def _replica_group(layout: Parallel) -> dist.ProcessGroup:
    """This rank's; all ranks make all of them together."""
    replicas = [replica_ranks(layout, replica) for replica in range(layout.data_parallel)]
    groups = [_host_group(ranks, layout, "REPLICA_GROUP") for ranks in replicas]
    return next(group for group, ranks in zip(groups, replicas, strict=True) if dist.get_rank() in ranks)


def _host_group(ranks: Iterable[int], layout: Parallel, name: str) -> dist.ProcessGroup:
    return parallel_state.create_group(
        list(ranks), backend="gloo", timeout=timedelta(seconds=layout.timeout_s), group_desc=name
    )


def _leave_groups() -> None:
    """Megatron forgets most of its groups without leaving them, and gloo's keep threads that never rest."""
    groups = [group for group in parallel_state._global_process_group_list or () if group is not None]
    if groups:
        dist.barrier()  # no rank still waits in one of them
    for group in groups:
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
