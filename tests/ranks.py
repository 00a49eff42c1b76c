"""Several ranks as threads of this process, without a launch, and where they stand.

`Ranks` stand for torch.distributed themselves. For the real collectives, over gloo, there is
`megatron_rapo.testing.ranks`; what keeps a process-wide state, as Megatron's layers and schedules do, needs
processes (tests/distributed).
"""

from __future__ import annotations

import pickle
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Queue
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.config import Parallel
from megatron_rapo.experience import delivery
from megatron_rapo.parallel import placement as placements
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights import export, gather, stream
from megatron_rapo.weights.transports import shard

T = TypeVar("T")
WAIT_S = 20.0  # for a peer


class Group:
    """Ranks that exchange with each other."""

    def __init__(self, ranks: Sequence[int], me: Callable[[], int]) -> None:
        self.ranks, self._me = list(ranks), me
        self.barrier = threading.Barrier(len(ranks))
        self._said: dict[int, bytes] = {}

    def size(self) -> int:
        return len(self.ranks)

    def rank(self) -> int:
        return self.ranks.index(self._me())

    def everyone(self, mine: Any) -> list[Any]:
        """What each rank says, in their order."""
        self._said[self._me()] = pickle.dumps(mine)
        self.barrier.wait(WAIT_S)
        found = [pickle.loads(self._said[rank]) for rank in self.ranks]
        self.barrier.wait(WAIT_S)
        return found


class Sent:
    """A message that lies in the sender's memory until it is taken."""

    def __init__(self, values: Tensor) -> None:
        assert values.is_contiguous(), "as backends demand"
        self._values, self._before = values, values.clone()
        self._over = threading.Event()
        self._lost = False

    def take(self) -> Tensor:
        assert torch.equal(self._values, self._before), "its memory was used again before it was taken"
        self._over.set()
        return self._before

    def lose(self) -> None:
        self._lost = True
        self._over.set()

    def wait(self) -> None:
        assert self._over.wait(WAIT_S), "nobody took a message"
        if self._lost:
            raise RuntimeError("connection closed by peer")


class Ranks:
    """All ranks of a layout, which stand for `torch.distributed` in the modules that exchange by it.

    A message is taken from the sender's own memory when it is received, so that who uses that memory again
    too early is found out.
    """

    def __init__(self, layout: Parallel, patch: pytest.MonkeyPatch) -> None:
        self.layout = layout
        self._thread = threading.local()
        self.world = Group(range(layout.world_size), self.get_rank)
        self.mail: dict[tuple[int, int], Queue[Sent]] = defaultdict(Queue)
        self._groups: dict[tuple[int, ...], Group] = {}
        for module in (delivery, export, gather, placements, shard, stream):
            patch.setattr(module, "dist", self)

    def run(self, work: Callable[[Placement], T]) -> list[T]:
        """`work` on every rank; what each returns. The first that fails ends the others."""
        with ThreadPoolExecutor(self.layout.world_size) as pool:
            running = [pool.submit(self._one, work, rank) for rank in range(self.layout.world_size)]
        failures = [error for each in running if (error := each.exception()) is not None]
        for error in sorted(failures, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        assert all(box.empty() for box in self.mail.values()), "a message was not taken"
        return [each.result() for each in running]

    def _one(self, work: Callable[[Placement], T], rank: int) -> T:
        self._thread.rank = rank
        try:
            return work(self.placement(rank))
        except BaseException:
            for group in [self.world, *self._groups.values()]:
                group.barrier.abort()
            raise

    def placement(self, rank: int) -> Placement:
        """Ranks are numbered TP fastest, then CP, DP, PP."""
        layout = self.layout
        sizes = (layout.tensor_parallel, layout.context_parallel, layout.data_parallel)
        tensor, rest = rank % sizes[0], rank // sizes[0]
        context, rest = rest % sizes[1], rest // sizes[1]
        data, stage = rest % sizes[2], rest // sizes[2]
        mates = tuple(range(rank - tensor, rank - tensor + sizes[0]))
        group = self._groups.setdefault(mates, Group(mates, self.get_rank))
        expert_tensor = rank % layout.expert_tensor_parallel
        first = rank - expert_tensor
        with_experts = tuple(range(first, first + layout.expert_tensor_parallel))
        block = sizes[0] * sizes[1]
        replica = tuple(r for r in range(layout.world_size) if r // block % sizes[2] == data)
        nowhere = cast(Any, None)
        return Placement(
            layout=layout,
            rank=rank,
            tensor_rank=tensor,
            pipeline_rank=stage,
            context_rank=context,
            data_rank=data,
            expert_tensor_rank=expert_tensor,
            tensor_group=cast(Any, group),
            expert_tensor_group=cast(
                Any, self._groups.setdefault(with_experts, Group(with_experts, self.get_rank))
            ),
            pipeline_group=nowhere,
            context_group=nowhere,
            gradient_group=nowhere,
            host_group=cast(Any, self.world),
            replica_group=cast(Any, self._groups.setdefault(replica, Group(replica, self.get_rank))),
        )

    # As torch.distributed has them.

    def get_process_group_ranks(self, group: Group) -> list[int]:
        return group.ranks

    def get_rank(self) -> int:
        return int(self._thread.rank)

    def get_world_size(self) -> int:
        return self.world.size()

    def barrier(self, group: Group) -> None:
        group.everyone(None)

    def broadcast_object_list(self, box: list[Any], src: int, group: Group) -> None:
        box[0] = group.everyone(box[0])[group.ranks.index(src)]

    def all_gather_object(self, out: list[Any], mine: Any, group: Group) -> None:
        found = group.everyone(mine)
        assert len(out) == len(found)
        out[:] = found

    def broadcast(self, values: Tensor, src: int, group: Group) -> None:
        assert values.is_contiguous(), "as backends demand"
        values.copy_(group.everyone(values)[group.ranks.index(src)])

    def isend(self, values: Tensor, dst: int, group: Group | None = None) -> Sent:
        assert group in (None, self.world)
        sent = Sent(values)
        self.mail[self.get_rank(), dst].put(sent)
        return sent

    def irecv(self, values: Tensor, src: int, group: Group | None = None) -> Any:
        assert group in (None, self.world)
        assert values.is_contiguous(), "as backends demand"
        return SimpleNamespace(wait=lambda: self.recv(values, src))

    def recv(self, values: Tensor, src: int) -> None:
        taken = self.mail[src, self.get_rank()].get(timeout=WAIT_S).take()
        assert taken.shape == values.shape
        values.copy_(taken)

    def P2POp(
        self, operation: Callable[..., Any], values: Tensor, group: Group, group_peer: int
    ) -> Callable[[], Any]:
        return partial(operation, values, group.ranks[group_peer])

    def batch_isend_irecv(self, operations: Sequence[Callable[[], Any]]) -> list[Any]:
        return [operation() for operation in operations]

    def destroy_process_group(self, group: Any) -> None:
        group.destroy()


def replica_of(group: dist.ProcessGroup) -> Placement:
    """The placement of a rank among replicas alone, which `group` holds (`megatron_rapo.testing.ranks`)."""
    alone = dist.group.WORLD
    assert alone is not None
    return Placement(
        layout=Parallel(data_parallel=group.size()),
        rank=group.rank(),
        tensor_rank=0,
        pipeline_rank=0,
        context_rank=0,
        data_rank=group.rank(),
        expert_tensor_rank=0,
        tensor_group=alone,
        expert_tensor_group=alone,
        pipeline_group=alone,
        context_group=alone,
        gradient_group=group,
        host_group=group,
        replica_group=alone,
    )
