"""How trainer and engines come together in one process group, outside of any that either has."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def new_group(
    store: dist.Store, rank: int, size: int, name: str, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Joins as `rank` of `size`; returns once all are there.

    torch makes groups only within a job's own. SGLang goes round that (`init_custom_process_group`), and
    ranks find each other only if all take the same way.

    Args:
        store: where they meet.
        name: of the group, the same on all.
        backend: "nccl" or "gloo".
        timeout: for all to come, and for each message.
    """
    group, _ = c10d._new_process_group_helper(
        size,
        rank,
        [],
        c10d.Backend(backend),
        c10d.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {member: member for member in range(size)}
    return group
