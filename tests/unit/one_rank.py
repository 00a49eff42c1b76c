"""A process group of this process alone, for code that exchanges over one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_rapo.config import Parallel
from megatron_rapo.parallel.placement import Placement, process_groups
from tests.ports import free_port


@contextmanager
def one_rank(directory: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def one_placement() -> Iterator[Placement]:
    """All process groups of a layout of one rank."""
    environment = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        with process_groups(Parallel(), seed=1) as placement:
            yield placement
