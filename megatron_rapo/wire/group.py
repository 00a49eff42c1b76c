"""How trainer and engines come together in one process group, outside of any that either has."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


@dataclass(frozen=True)
class Meeting:
    """Where and as what the group comes together.

    Trainer ranks are its first ranks, the engines' follow in their order.
    """

    address: str
    port: int
    name: str
    backend: str
    trainer_ranks: int
    engine_ranks: tuple[int, ...]

    @property
    def size(self) -> int:
        """All of its ranks."""
        return self.trainer_ranks + sum(self.engine_ranks)

    @property
    def first_ranks(self) -> list[int]:
        """Each engine's first rank."""
        return list(itertools.accumulate(self.engine_ranks[:-1], initial=self.trainer_ranks))


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
