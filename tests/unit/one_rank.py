"""A process group of this process alone, for code that exchanges over one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist


@contextmanager
def one_rank(directory: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
