"""Where a rank stands that is a thread of this process (`megatron_rapo.testing.ranks`)."""

from __future__ import annotations

import torch.distributed as dist

from megatron_rapo.config import Parallel
from megatron_rapo.parallel.placement import Placement


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
