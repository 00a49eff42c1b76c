"""Shards of several ranks, straight to engines of several ranks, against the HF file that they are of."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.errors import EngineLost
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.gather import StageWeights
from megatron_rapo.weights.stream import SLOTS
from megatron_rapo.weights.transports import shard
from megatron_rapo.weights.transports.shard import ShardTransport
from megatron_rapo.wire.group import Meeting
from megatron_rapo.wire.slices import CHECKSUM_BYTES, SliceMessage
from tests.chunks import loaded_chunks
from tests.distributed.jobs import layout
from tests.models import make_hf_model
from tests.ranks import WAIT_S, Ranks, Sent

BUCKET_BYTES = 60_000  # messages of several slices, and slices that go alone


@pytest.fixture(scope="module", params=["qwen2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    return make_hf_model(path, family=request.param, num_key_value_heads=4)


@pytest.fixture
def truth(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture(params=["tp2-pp2"])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(layout(request.param), monkeypatch)


class Invitation:
    """In place of a group over TCP."""

    number = 0

    def __init__(self, engines: Engines, trainer_ranks: int) -> None:
        Invitation.number += 1
        self._membership = engines.membership
        sizes = tuple(engines.tensor_parallel())
        self.meeting = Meeting("", 0, f"group {Invitation.number}", "", trainer_ranks, sizes)
        engines.groups.append(self.meeting.name)
        engines.trainer_ranks = trainer_ranks

    def holds_for(self, engines: Engines) -> bool:
        return self._membership == engines.membership

    def accepted(self) -> None:
        pass


class Joined:
    """A trainer rank's side of the group."""

    def __init__(self, engines: Engines, meeting: Meeting, rank: int) -> None:
        assert meeting.name == engines.groups[-1]
        self._engines, self._rank = engines, rank
        engines.joined.append(rank)

    def send(self, values: list[Tensor], to: int, tag: int) -> Sent:
        sent = Sent(values[0])
        self._engines.take_up(self._rank, to, sent)
        return sent

    def destroy(self) -> None:
        self._engines.joined.remove(self._rank)


class Engines:
    """Engines of several ranks that take slices, and check what they are told of them."""

    def __init__(self, sizes: Sequence[int], limit: int) -> None:
        self.sizes, self.limit = list(sizes), limit
        self.membership = 0
        self.takes_slices = True
        self.groups: list[str] = []
        self.trainer_ranks = 0
        self.collected: list[bool] = []
        self.joined: list[int] = []
        self.versions: list[Any] = []
        self.log: list[str] = []
        self.dies_in: int | None = None
        self.rounds = 0
        self.held: dict[tuple[int, int, str], list[tuple[int, Tensor]]] = {}
        self.checksums: list[int] = []
        self._mail: dict[tuple[int, int], list[Sent]] = {}
        self._came = threading.Condition()
        self._spoilt = ""  # the group that an engine's death has ended
        self._work = ThreadPoolExecutor(1)
        self._last: Future[list[Any]] | None = None

    @property
    def urls(self) -> list[str]:
        return [f"http://{number}" for number in range(len(self.sizes))]

    def tensor_parallel(self) -> list[int]:
        return self.sizes

    def take_slices(self) -> bool:
        return self.takes_slices

    def begin_update(self) -> None:
        self.log.append("begin")
        self.rounds = 0

    def end_update(self, version: int) -> None:
        assert self._last is not None and self._last.done()
        self.log.append(f"end {version}")

    def take_up(self, source: int, to: int, sent: Sent) -> None:
        with self._came:
            if self.groups[-1] == self._spoilt:
                sent.lose()
            self._mail.setdefault((source, to), []).append(sent)
            self._came.notify_all()

    def each(self, ask: Any, parts: Sequence[Any]) -> Future[list[Any]]:
        assert self._last is None or self._last.done(), "one request at a time: two could change places"
        assert len(parts) == len(self.sizes)
        told = [asyncio.run(ask(Told(), part)) for part in parts]
        self.rounds += 1
        self._last = self._work.submit(self._receive, told, self.rounds)
        return self._last

    def _receive(self, told: Sequence[Any], number: int) -> list[Any]:
        if number == self.dies_in:
            with self._came:
                self._spoilt = self.groups[-1]
                for sent in (sent for box in self._mail.values() for sent in box):
                    sent.lose()
            self.sizes.pop()
            self.membership += 1
            raise EngineLost("the engine is gone")
        for engine, (messages, group, dtype, version) in enumerate(told):
            assert (group, dtype) == (self.groups[-1], torch.float32)
            self.versions.append(version)
            routes = [(message.source, message.engine_rank) for message in messages]
            assert len(set(routes)) == len(routes), "one message a round from each rank to each"
            for message in messages:
                self._take(engine, self.trainer_ranks + sum(self.sizes[:engine]), message)
        return [None] * len(told)

    def _take(self, engine: int, first_rank: int, message: SliceMessage) -> None:
        route = message.source, first_rank + message.engine_rank
        with self._came:
            assert self._came.wait_for(lambda: self._mail.get(route), WAIT_S), f"nothing came by {route}"
            flat = self._mail[route].pop(0).take()
        values = flat[:-CHECKSUM_BYTES].view(torch.float32)
        told = int.from_bytes(flat[-CHECKSUM_BYTES:].numpy().tobytes(), "little")
        assert told == tensor_checksum(values)
        if engine == 0:
            self.checksums.append(told)
        assert values.nbytes <= self.limit or len(message.slices) == 1
        start = 0
        for name, cut, begin, end in message.slices:
            shape = list(self.shapes[name])
            if cut is None:
                assert (begin, end) == (0, 1)
            else:
                shape[cut] = end - begin
            count = int(torch.Size(shape).numel())
            part = values[start : start + count].view(shape).clone()
            self.held.setdefault((engine, message.engine_rank, name), []).append((begin, part))
            start += count
        assert start == len(values)

    shapes: dict[str, torch.Size]


class Told:
    """One engine, which says what it is told to take."""

    async def receive_slices(self, *told: Any, timeout: float) -> Any:
        assert timeout > 0
        return told


def sending(
    ranks: Ranks,
    model: Path,
    engines: Engines,
    work: Callable[[ShardTransport, Placement], Any],
    fallback: Any,
) -> list[Any]:
    architecture = read_architecture(model)

    def one(place: Placement) -> Any:
        held = StageWeights(loaded_chunks(model, place), architecture, place)
        way = ShardTransport(
            architecture,
            held,
            place,
            torch.float32,
            fallback,
            vocabulary_multiple=1,
            bucket_bytes=BUCKET_BYTES,
        )
        return work(way, place)

    return ranks.run(one)


@pytest.fixture
def engines(truth: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    made = Engines([2, 1], BUCKET_BYTES // SLOTS)
    made.shapes = {name: values.shape for name, values in truth.items()}
    monkeypatch.setattr(shard, "Invitation", Invitation)
    monkeypatch.setattr(shard, "collect_lost_groups", lambda: made.collected.append(True))
    monkeypatch.setattr(shard, "join", lambda meeting, rank: Joined(made, meeting, rank))
    yield made
    made._work.shutdown()


def check_arrived(engines: Engines, truth: dict[str, Tensor]) -> None:
    """Rank 0 of the first engine has the first halves, rank 1 the second ones; the other engine has all."""
    assert {place[:2] for place in engines.held} == {
        (engine, rank) for engine, size in enumerate(engines.sizes) for rank in range(size)
    }
    for name, values in truth.items():
        # Norms of queries and keys over all heads are those, too, that trainer ranks have parts of.
        whole = name.endswith("mlp.gate.weight") or (values.dim() == 1 and "bias" not in name)
        cut = None if whole else 0
        if "o_proj" in name or "down_proj" in name:
            cut = 1
        for engine, size in enumerate(engines.sizes):
            for rank in range(size):
                parts = sorted(engines.held[engine, rank, name], key=lambda part: part[0])
                found = torch.cat([part for _, part in parts], dim=cut or 0)
                expected = values
                if cut is not None and values.size(cut) == 61:  # the engine pads it to 64
                    expected = values[: 32 if size == 2 else 64] if rank == 0 else values[32:]
                elif cut is not None:
                    sections = 2 if "gate_up_proj" in name else 1
                    halves = [section.chunk(size, cut)[rank] for section in values.chunk(sections)]
                    expected = torch.cat(halves)
                assert torch.equal(found, expected), (engine, rank, name)
    engines.held.clear()


@pytest.mark.parametrize(
    ("ranks", "model"),
    [
        *((layout, "qwen2") for layout in ("tp2-pp2", "tp4", "pp2-vpp2", "dp4")),
        *((layout, family) for layout in ("tp2-pp2", "tp4") for family in ("olmo2", "glm4")),
        *((layout, "qwen3_moe") for layout in ("pp2-ep2", "tp2-sp-ep2", "tp2-sp-ep2-etp2")),
    ],
    indirect=True,
)
def test_each_engine_rank_gets_its_slices_from_the_ranks_that_hold_them(
    ranks: Ranks,
    model: Path,
    engines: Engines,
    truth: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sums: list[list[int]] = []

    def send(way: ShardTransport, place: Placement) -> Any:
        for version in (3, 4):
            checksums = way.send(cast(Any, engines) if place.is_main else None, version)
            if place.is_main:
                assert sorted(checksums.values()) == sorted(engines.checksums)
                sums.append(sorted(engines.checksums))
                engines.checksums.clear()
                check_arrived(engines, truth)
        return checksums

    made: list[int] = []

    def memory(nbytes: int) -> Tensor:
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(shard, "device_memory", memory)
    found = sending(ranks, model, engines, send, None)
    assert len(made) <= SLOTS * engines.trainer_ranks, "kept for the next publication"
    assert all(checksums == found[0] for checksums in found), "all ranks know what was sent"
    assert sums[0] == sums[1]
    assert engines.log == ["begin", "end 3", "begin", "end 4"]
    assert len(engines.groups) == 1, "the second time finds the group of the first"
    rounds = engines.rounds
    assert rounds > 1
    assert engines.versions == [*[None] * 2 * (rounds - 1), 3, 3, *[None] * 2 * (rounds - 1), 4, 4]


@pytest.mark.parametrize("ranks", ["tp2-pp2", "pp4"], indirect=True)
@pytest.mark.parametrize("dies_in", [1, 2])
def test_a_lost_engine_fails_on_the_main_rank_and_the_next_try_has_a_new_group(
    dies_in: int, ranks: Ranks, model: Path, engines: Engines, truth: dict[str, Tensor]
) -> None:
    engines.dies_in = dies_in

    def send(way: ShardTransport, place: Placement) -> None:
        if place.is_main:
            with pytest.raises(EngineLost, match=r"the engine is gone|was not taken"):
                way.send(cast(Any, engines), 1)
            assert engines.log == ["begin"]
        else:
            assert way.send(None, 1) == {}
        place.share_from_main(None)
        assert engines.joined == []
        if place.is_main:
            engines.dies_in = None
            engines.held.clear()
            engines._mail.clear()
        place.share_from_main(None)
        way.send(cast(Any, engines) if place.is_main else None, 2)

    sending(ranks, model, engines, send, None)
    assert engines.log == ["begin", "begin", "end 2"]
    assert len(engines.groups) == 2 and len(engines.sizes) == 1
    assert len(engines.collected) == 8, "each rank has what is left of the group freed before the next try"
    check_arrived(engines, truth)


def test_an_engine_that_came_has_a_new_group_made(
    ranks: Ranks, model: Path, engines: Engines, truth: dict[str, Tensor]
) -> None:
    def send(way: ShardTransport, place: Placement) -> None:
        for version in (1, 2):
            way.send(cast(Any, engines) if place.is_main else None, version)
            if place.is_main:
                check_arrived(engines, truth)
                engines.sizes, engines.membership = [1, 2, 1], 1
            place.share_from_main(None)

    sending(ranks, model, engines, send, None)
    assert len(engines.groups) == 2 and sorted(engines.joined) == list(range(4))
    assert len(engines.collected) == 4, "a group that is left on purpose is freed then"


def test_engines_that_take_whole_tensors_get_them_by_the_fallback(
    ranks: Ranks, model: Path, engines: Engines
) -> None:
    engines.takes_slices = False
    asked = []

    def instead(given: Any, version: int) -> dict[str, int]:
        asked.append((given, version))
        return {"all": 5}

    fallback = SimpleNamespace(send=instead)

    def send(way: ShardTransport, place: Placement) -> Any:
        return way.send(cast(Any, engines) if place.is_main else None, 7)

    assert sending(ranks, model, engines, send, fallback) == [{"all": 5}] * 4
    assert sorted(asked, key=str) == sorted([(None, 7)] * 3 + [(engines, 7)], key=str)
    assert engines.log == []


def test_engines_that_cannot_be_opened_or_joined_fail_on_the_main_rank(
    ranks: Ranks, model: Path, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise EngineLost("not now")

    def send(way: ShardTransport, place: Placement) -> None:
        for blocked in (engines, shard):
            with pytest.MonkeyPatch.context() as patch:
                if place.is_main and blocked is engines:
                    patch.setattr(engines, "begin_update", refuse)
                elif place.is_main:
                    patch.setattr(shard, "Invitation", refuse)
                place.share_from_main(None)
                if place.is_main:
                    with pytest.raises(EngineLost, match="not now"):
                        way.send(cast(Any, engines), 1)
                else:
                    assert way.send(None, 1) == {}
                place.share_from_main(None)
        way.send(cast(Any, engines) if place.is_main else None, 2)

    sending(ranks, model, engines, send, None)
    assert engines.log == ["begin", "begin", "end 2"]
