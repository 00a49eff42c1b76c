"""Ranks that are threads of this process, with gloo between them: for code that exchanges over several ranks.

It costs milliseconds, where processes that import torch cost seconds. What keeps a process-wide state, as
Megatron's layers and schedules do, needs processes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
# A rank whose peer has failed waits for it as long.
TIMEOUT = timedelta(seconds=10)


def on_ranks(size: int, function: Callable[[dist.ProcessGroup], T]) -> list[T]:
    """What `function` returns on each rank, given the group of them all; raises what a rank raises."""
    store = dist.HashStore()
    with ThreadPoolExecutor(size) as threads:
        # All are kept to the end: a rank that is done must not close what its peer still connects to.
        groups = list(threads.map(lambda rank: _group(store, rank, size), range(size)))
        return list(threads.map(function, groups))


def alone() -> dist.ProcessGroup:
    """A group of one rank."""
    return _group(dist.HashStore(), 0, 1)


def _group(store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
    group = dist.ProcessGroup(store, rank, size)
    gloo = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    return group
