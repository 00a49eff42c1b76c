"""Ranks that are threads of this process, with gloo between them: for code that exchanges over several ranks.

It costs milliseconds, where processes that import torch cost seconds. What keeps a process-wide state, as
Megatron's layers and schedules do, needs processes (tests/distributed).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_rapo.config import Parallel
from megatron_rapo.parallel.placement import Placement

T = TypeVar("T")
# A rank whose peer has failed waits for it as long.
TIMEOUT = timedelta(seconds=10)


def on_ranks(size: int, function: Callable[[dist.ProcessGroup], T]) -> list[T]:
    """What `function` returns on each rank, given the group of them all; raises what a rank raises."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        group = dist.ProcessGroup(store, rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        return function(group)

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))


def placement_of(group: dist.ProcessGroup) -> Placement:
    """Of a rank among replicas alone, which `group` holds."""
    alone = dist.group.WORLD
    assert alone is not None
    return Placement(
        layout=Parallel(data_parallel=group.size()),
        rank=group.rank(),
        tensor_rank=0,
        pipeline_rank=0,
        context_rank=0,
        data_rank=group.rank(),
        tensor_group=alone,
        pipeline_group=alone,
        context_group=alone,
        gradient_group=group,
        host_group=group,
        replica_group=alone,
    )
