"""The ranks of a run as threads of this process, which share objects as `Placement` does."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

WAIT_S = 30.0


class Rank:
    """One of `world` ranks: every `stride`-th is a head. Objects are pickled on their way."""

    def __init__(self, rank: int, stride: int, box: dict[int, Any], barrier: threading.Barrier) -> None:
        self.is_main, self.is_head, self.data_rank = rank == 0, rank % stride == 0, rank // stride
        self.layout = SimpleNamespace(data_parallel=barrier.parties // stride)
        self._rank, self._stride, self._box, self._barrier = rank, stride, box, barrier

    def share_from_heads(self, mine: Any) -> list[Any]:
        shared = self._exchange(mine)
        return [shared[head] for head in range(0, self._barrier.parties, self._stride)]

    def share_from_main(self, mine: Any) -> Any:
        return self._exchange(mine)[0]

    def _exchange(self, mine: Any) -> dict[int, Any]:
        self._box[self._rank] = pickle.dumps(mine)
        self._barrier.wait(WAIT_S)
        found = {rank: pickle.loads(data) for rank, data in self._box.items()}
        self._barrier.wait(WAIT_S)
        return found


def on_ranks(world: int, work: Callable[[Any], Any], *, stride: int = 1) -> Sequence[Any]:
    """What each rank makes of its place in the run, all at the same time; the first error of any."""
    box: dict[int, Any] = {}
    barrier = threading.Barrier(world)

    def of(rank: int) -> Any:
        try:
            return work(Rank(rank, stride, box, barrier))
        except BaseException:
            barrier.abort()  # the others wait for it in vain
            raise

    with ThreadPoolExecutor(world) as threads:
        futures = [threads.submit(of, rank) for rank in range(world)]
    errors = [future.exception() for future in futures]
    for kind in (lambda error: not isinstance(error, threading.BrokenBarrierError), lambda _: True):
        for error in errors:
            if error is not None and kind(error):
                raise error
    return [future.result() for future in futures]
