"""Weights that several ranks hold, written and streamed, against the HF file that they are of."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.config import Parallel
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights import export, stream
from megatron_rapo.weights import tensor_table as tensor_tables
from megatron_rapo.weights.buckets import Bucket
from megatron_rapo.weights.export import hf_tensors, write_hf_model
from megatron_rapo.weights.gather import StageWeights
from megatron_rapo.weights.holders import Holders, holders
from megatron_rapo.weights.stream import SLOTS, WeightStream
from megatron_rapo.weights.tensor_table import tensor_table
from tests.chunks import loaded_chunks
from tests.distributed.jobs import layout
from tests.models import make_hf_model
from tests.ranks import Ranks

LAYOUTS = ["tp2-pp2", "tp2-cp2", "tp4", "pp2-vpp2", "pp4", "dp4"]
BUCKET_BYTES = 60_000  # several buckets of several tensors, and tensors that go alone


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    return make_hf_model(path, tied=request.param, num_key_value_heads=4)


@pytest.fixture
def architecture(model: Path) -> Architecture:
    return read_architecture(model)


@pytest.fixture
def truth(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


@pytest.fixture(params=LAYOUTS)
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(layout(request.param), monkeypatch)


# As a HF model directory


def test_a_model_is_written_whole(
    ranks: Ranks, model: Path, architecture: Architecture, truth: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/left").write_text("by a start that was killed")

    def write(place: Placement) -> dict[str, int]:
        return write_hf_model(loaded_chunks(model, place), architecture, place, out, companions_of=model)

    checksums = {name: tensor_checksum(values) for name, values in truth.items()}
    assert ranks.run(write) == [checksums] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file.name: load_file(file) for file in out.glob("*.safetensors")}
    assert len(files) == ranks.layout.pipeline_parallel, "a file a stage, by one replica"
    assert {name: file for file, held in files.items() for name in held} == weight_map
    for name, values in truth.items():
        assert torch.equal(files[weight_map[name]][name], values), name
    assert (out / "config.json").read_text() == (model / "config.json").read_text()
    assert not (out / "left").exists()


def test_each_stage_exports_its_own_tensors_on_its_first_rank(
    ranks: Ranks, model: Path, architecture: Architecture
) -> None:
    """`value` in place of the parameters, as for gradients."""

    def names(place: Placement) -> set[str]:
        found = dict(
            hf_tensors(loaded_chunks(model, place), architecture, place, value=lambda p: p.detach() * 2)
        )
        whole = load_file(model / "model.safetensors")
        assert all(torch.equal(values, 2 * whole[name]) for name, values in found.items())
        return set(found)

    table = tensor_table(architecture, ranks.layout)
    for rank, found in enumerate(ranks.run(names)):
        place = ranks.placement(rank)
        mine = {tensor.name for tensor in table if tensor.holders.collector == rank}
        first = place.tensor_rank == place.context_rank == place.data_rank == 0
        assert found == mine and bool(mine) == first


@pytest.mark.parametrize("model", [False], indirect=True)
@pytest.mark.parametrize("ranks", ["tp2-pp2"], indirect=True)
@pytest.mark.parametrize("failing", ["model-rank00000", "model-rank00002", "companions"])
def test_what_one_stage_cannot_write_fails_on_all_ranks(
    failing: str,
    ranks: Ranks,
    model: Path,
    architecture: Architecture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = export.save_tensors

    def full(*arguments: Any) -> None:
        if failing == "companions" or arguments[1].name.startswith(failing):
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(export, "write_companions" if failing == "companions" else "save_tensors", full)
    refusals = []

    def write(place: Placement) -> None:
        chunks = loaded_chunks(model, place)
        with pytest.raises(RapoError, match="out: No space left on device; free space") as refused:
            write_hf_model(chunks, architecture, place, tmp_path / "out", companions_of=model)
        refusals.append(refused.value)
        if place.is_main:
            assert list(tmp_path.iterdir()) == []

    ranks.run(write)
    assert len(refusals) == 4


# Whoever holds them


@pytest.mark.parametrize("model", [False], indirect=True)
@pytest.mark.parametrize("ranks", ["tp2", "pp2", "tp2-cp2", "dp4"], indirect=True)
def test_other_ranks_than_the_first_may_be_the_ones_that_send(
    ranks: Ranks,
    model: Path,
    architecture: Architecture,
    truth: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the last stage the last copy sends, as experts of other ranks would."""

    def backwards(layout: Parallel, stage: int) -> Holders:
        found = holders(layout, stage)
        return Holders(found.copies[::-1]) if stage == layout.pipeline_parallel - 1 else found

    monkeypatch.setattr(tensor_tables, "holders", backwards)

    def export(place: Placement) -> dict[str, Tensor]:
        return dict(hf_tensors(loaded_chunks(model, place), architecture, place))

    exported = ranks.run(export)
    collector = {tensor.name: tensor.holders.collector for tensor in tensor_table(architecture, ranks.layout)}
    assert max(collector.values()) >= 2, "none of the first copy's ranks"
    for name, values in truth.items():
        assert [rank for rank, found in enumerate(exported) if name in found] == [collector[name]]
        assert torch.equal(exported[collector[name]][name], values)

    def run(sending: WeightStream, place: Placement) -> dict[str, Tensor]:
        late = LateReader()
        sending.run((lambda: late) if place.is_main else None)
        return late.arrived

    arrived = streamed(ranks, model, run)[0]
    assert arrived.keys() == truth.keys()
    assert all(torch.equal(arrived[name], values) for name, values in truth.items())


def test_a_group_is_of_the_ranks_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Ranks(layout("tp2"), monkeypatch).placement(3)
    assert place.group_of((2, 3)) is place.tensor_group
    for others in ((0, 1), (3, 2), (2,)):
        with pytest.raises(ValueError, match="rank 3 has no group with ranks"):
            place.group_of(others)


# As a stream to the main rank


def streamed(
    ranks: Ranks,
    model: Path,
    work: Callable[[WeightStream, Placement], Any],
    bucket_bytes: int = BUCKET_BYTES,
    memory: Callable[[int], Tensor] = stream.device_memory,
) -> list[Any]:
    architecture = read_architecture(model)
    table = tensor_table(architecture, ranks.layout)

    def one(place: Placement) -> Any:
        held = StageWeights(loaded_chunks(model, place), architecture, place)
        return work(WeightStream(table, held, place, torch.float32, bucket_bytes, memory), place)

    return ranks.run(one)


class LateReader:
    """Takes buckets as late as it may: when it is waited for."""

    def __init__(self) -> None:
        self.arrived: dict[str, Tensor] = {}
        self.waiting: dict[Bucket, Tensor] = {}

    def __call__(self, bucket: Bucket, flat: Tensor) -> Callable[[], None]:
        assert flat.shape == (bucket.nbytes,)
        self.waiting[bucket] = flat.clone()
        assert len(self.waiting) <= SLOTS
        return partial(self.read, bucket, flat)

    def read(self, bucket: Bucket, flat: Tensor) -> None:
        before = self.waiting.pop(bucket, None)
        if before is not None:  # it may be asked again
            assert torch.equal(flat, before), "its memory was used again before it was read"
            for tensor, view in bucket.views(flat):
                assert tensor.name not in self.arrived
                self.arrived[tensor.name] = view.clone()


@pytest.mark.parametrize("model", [False], indirect=True)
@pytest.mark.parametrize("bucket_bytes", [BUCKET_BYTES, 10**9])
def test_the_main_rank_gets_every_tensor_once_in_a_memory_of_its_own_until_it_is_read(
    bucket_bytes: int,
    ranks: Ranks,
    model: Path,
    architecture: Architecture,
    truth: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    relayed: list[int] = []

    def memory(nbytes: int) -> Tensor:
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def of_device(nbytes: int) -> Tensor:
        relayed.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(stream, "device_memory", of_device)

    def run(sending: WeightStream, place: Placement) -> int:
        for _ in range(2):
            late = LateReader()
            sending.run((lambda reader=late: reader) if place.is_main else None)
            if place.is_main:
                assert late.arrived.keys() == truth.keys()
                assert all(torch.equal(late.arrived[name], values) for name, values in truth.items())
                assert late.waiting == {}
        return len(sending.buckets)

    buckets = streamed(ranks, model, run, bucket_bytes, memory)[0]
    assert len(made) == min(SLOTS, buckets), "one a slot, kept for the next publication"
    largest = max(values.nbytes for values in truth.values())
    assert min(made) <= bucket_bytes // SLOTS and max(made) <= max(bucket_bytes // SLOTS, largest)
    senders = ranks.layout.pipeline_parallel - 1
    assert len(relayed) <= senders * SLOTS and (relayed != []) == (senders > 0)


@pytest.mark.parametrize("model", [False], indirect=True)
@pytest.mark.parametrize("ranks", ["tp2-pp2", "pp4"], indirect=True)
@pytest.mark.parametrize("failing", ["open", "deliver", "wait", "the last wait"])
def test_an_engines_failure_is_the_main_ranks_and_nobody_is_left_waiting(
    failing: str, ranks: Ranks, model: Path
) -> None:
    def run(sending: WeightStream, place: Placement) -> int:
        delivered: list[Bucket] = []

        def fail(where: str) -> None:
            if where == failing:
                raise EngineLost(f"at {where}, {len(delivered)}")

        def deliver(bucket: Bucket, flat: Tensor) -> Callable[[], None]:
            delivered.append(bucket)
            if len(delivered) == 3:
                fail("deliver")

            def wait() -> None:
                fail("wait")
                if bucket is sending.buckets[-1]:
                    fail("the last wait")

            return wait

        def open_engines() -> Any:
            fail("open")
            return deliver

        if not place.is_main:
            sending.run(None)
            return 0
        with pytest.raises(EngineLost, match=f"at {failing}, "):
            sending.run(open_engines)
        return len(delivered)

    buckets = streamed(ranks, model, lambda sending, _: len(sending.buckets))[0]
    expected = {"open": 0, "deliver": 3, "wait": 2, "the last wait": buckets}
    assert streamed(ranks, model, run)[0] == expected[failing]
