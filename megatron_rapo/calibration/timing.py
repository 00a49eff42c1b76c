"""How long a piece of work takes when nothing disturbs it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_FEWEST = 3


def fastest(work: Callable[[], object], seconds: float = 0.5) -> float:
    """Seconds of the fastest of several runs after a first one, which other programs disturbed least."""
    work()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < _FEWEST or time.perf_counter() - began < seconds:
        _synchronize()
        start = time.perf_counter()
        work()
        _synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
