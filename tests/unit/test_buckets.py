"""Buckets: what goes into each, and what engines are told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.errors import EngineLost
from megatron_rapo.weights.buckets import Bucket, make_buckets
from megatron_rapo.weights.holders import Holders
from megatron_rapo.weights.tensor_table import HFTensor
from megatron_rapo.weights.transports import distributed
from megatron_rapo.weights.transports.bucketed import TIMEOUT_S
from megatron_rapo.weights.transports.distributed import DistributedTransport
from megatron_rapo.weights.transports.tensor import TensorTransport

HERE, ELSEWHERE = Holders(((0, 1), (2, 3))), Holders(((4, 5), (6, 7)))
TABLE = [
    HFTensor("a", (2, 3), 0, HERE),  # 24 bytes
    HFTensor("b", (4,), None, HERE),  # 16
    HFTensor("c", (5, 2), 1, HERE),  # 40
    HFTensor("d", (1,), None, ELSEWHERE),  # 4
]


def names(limit: int) -> list[list[str]]:
    return [[each.name for each in bucket.tensors] for bucket in make_buckets(TABLE, torch.float32, limit)]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1000, [["a", "b", "c"], ["d"]]),
        (80, [["a", "b", "c"], ["d"]]),
        (79, [["a", "b"], ["c"], ["d"]]),
        (40, [["a", "b"], ["c"], ["d"]]),
        (39, [["a"], ["b"], ["c"], ["d"]]),
        (1, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_buckets_are_of_the_same_holders_and_within_the_limit(limit: int, expected: list[list[str]]) -> None:
    assert names(limit) == expected
    assert make_buckets([], torch.float32, limit) == []


def test_a_buckets_tensors_lie_one_behind_the_other() -> None:
    [bucket, last] = make_buckets(TABLE, torch.float32, 1000)
    assert (bucket.holders, bucket.nbytes, last.holders, last.nbytes) == (HERE, 80, ELSEWHERE, 4)
    flat = torch.arange(30.0).view(torch.uint8)  # longer than the bucket
    found = dict(bucket.views(flat))
    assert {each.name: values.tolist() for each, values in found.items()} == {
        "a": [[0, 1, 2], [3, 4, 5]],
        "b": [6, 7, 8, 9],
        "c": [[10, 11], [12, 13], [14, 15], [16, 17], [18, 19]],
    }
    assert Bucket(bucket.tensors, torch.bfloat16).nbytes == 40


class Stream:
    """Two buckets of numbers."""

    buckets = make_buckets(TABLE, torch.float32, 40)[1:]

    def run(self, open_engines: Any) -> None:
        if open_engines is None:
            return
        deliver, waits = open_engines(), []
        for bucket in self.buckets:
            waits.append(deliver(bucket, torch.arange(bucket.nbytes / 4).view(torch.uint8)))
        for wait in waits:
            wait()
            wait()  # as a stream may


class Engines:
    """Two engines, of one rank and of two, that note what they are told."""

    def __init__(self) -> None:
        self.urls = ["http://127.0.0.1:1", "http://localhost:2"]
        self.membership = 0
        self.log: list[Any] = []
        self.lost = False
        self._last: Future[list[Any]] | None = None

    def begin_update(self) -> None:
        self.log.append("begin")

    def end_update(self, version: int) -> None:
        self.log.append(f"end {version}")

    def tensor_parallel(self) -> list[int]:
        return [1, 2]

    def each(self, ask: Any, parts: Sequence[Any]) -> Future[list[Any]]:
        self.log.append([asyncio.run(ask(Told(), part)) for part in parts])
        self._last = Future()
        if self.lost:
            self._last.set_exception(EngineLost("gone"))
        else:
            self._last.set_result([{}, {}])
        return self._last


class Told:
    """One engine, which says what it is told to take."""

    async def receive_bucket(self, layout: Any, group: str, version: Any, *, timeout: float) -> Any:
        assert timeout == TIMEOUT_S
        return [(one.name, one.shape, one.dtype) for one in layout], group, version

    async def receive_handles(self, named: Any, ranks: int, version: Any, *, timeout: float) -> Any:
        assert timeout == TIMEOUT_S
        return [(name, view.tolist()) for name, view in named], ranks, version


class Group:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def broadcast(self, flat: Tensor, root: int) -> Any:
        self.log.append(("broadcast", len(flat), root))
        return SimpleNamespace(is_completed=lambda: True, wait=lambda: None)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What was done to make and leave groups."""
    log: list[Any] = []

    class Invitation:
        def __init__(self, engines: Engines, trainer_ranks: int) -> None:
            assert trainer_ranks == 1
            log.append("invited")
            self.urls, self._membership = engines.urls, engines.membership
            self.meeting = SimpleNamespace(name=f"group {len(log)}")

        def holds_for(self, engines: Engines) -> bool:
            return self._membership == engines.membership

        def accepted(self) -> None:
            log.append("accepted")

    def join(meeting: Any, rank: int) -> Group:
        log.append(f"joined as {rank}")
        return Group(log)

    monkeypatch.setattr(distributed, "Invitation", Invitation)
    monkeypatch.setattr(distributed, "join", join)
    monkeypatch.setattr(distributed, "collect_lost_groups", lambda: log.append("collected"))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda group: log.append("left"))
    yield log


MAKING = ["collected", "invited", "joined as 0", "accepted"]
SENDING = [("broadcast", 40, 0), ("broadcast", 4, 0)]


def test_a_broadcast_tells_what_is_in_it(joined: list[Any]) -> None:
    engines, way = Engines(), DistributedTransport(cast(Any, Stream()))
    sums = {"c": tensor_checksum(torch.arange(10.0)), "d": tensor_checksum(torch.arange(1.0))}
    assert way.send(cast(Any, engines), 7) == sums
    first = [("c", (5, 2), torch.float32)], "group 2", None
    last = [("d", (1,), torch.float32)], "group 2", 7
    assert engines.log == ["begin", [first] * 2, [last] * 2, "end 7"]
    assert joined == [*MAKING, *SENDING]
    assert way.send(None, 8) == {}


def test_a_group_lasts_as_long_as_its_engines(joined: list[Any]) -> None:
    engines, way = Engines(), DistributedTransport(cast(Any, Stream()))
    way.send(cast(Any, engines), 1)
    way.send(cast(Any, engines), 2)
    assert joined == [*MAKING, *SENDING, *SENDING]
    joined.clear()
    engines.membership = 1
    way.send(cast(Any, engines), 3)
    assert joined == ["left", *MAKING[1:], *SENDING]
    joined.clear()
    engines.lost = True
    with pytest.raises(EngineLost, match="gone"):
        way.send(cast(Any, engines), 4)
    assert joined[-1] == "left" and "end 4" not in engines.log
    joined.clear()
    engines.lost = False
    way.send(cast(Any, engines), 5)
    assert joined == [*MAKING, *SENDING]


def test_every_engine_is_told_of_the_memory_and_of_its_ranks() -> None:
    engines, way = Engines(), TensorTransport(cast(Any, Stream()))
    assert set(way.send(cast(Any, engines), 7)) == {"c", "d"}
    views = [("c", torch.arange(10.0).view(5, 2).tolist())], [("d", [0.0])]
    first, last = (
        [(view, size, named) for size in (1, 2)] for view, named in zip(views, (None, 7), strict=True)
    )
    assert engines.log == ["begin", first, last, "end 7"]
