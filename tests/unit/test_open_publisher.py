"""The publisher and the transport that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.publish.opening import open_publisher
from megatron_rapo.publish.publisher import Publisher
from megatron_rapo.weights.stream import device_memory
from megatron_rapo.weights.transports.disk import DiskTransport
from megatron_rapo.weights.transports.distributed import DistributedTransport
from megatron_rapo.weights.transports.shard import ShardTransport
from megatron_rapo.weights.transports.tensor import TensorTransport, handle_memory
from tests.models import make_hf_model
from tests.unit.one_rank import one_placement

BUCKET_BYTES = 30_000


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as alone:
        yield alone


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("opening") / "model", num_hidden_layers=1)


def opened(model: Path, placement: Placement, directory: Path, weights: Any, **options: Any) -> Publisher:
    config: RunConfig = validate(
        {
            "run": {"directory": str(directory), "steps": 2},
            "model": {"path": str(model), "dtype": "float32", "vocabulary_multiple": 8},
            "data": {"source": "countdown"},
            "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
            "weights": weights,
        },
        "test",
    )
    policy = SimpleNamespace(chunks=[], architecture=read_architecture(model))
    prompts = SimpleNamespace(prompts=["first", "second", "third"])
    engines = SimpleNamespace(pool="the main rank's")
    return open_publisher(
        config, cast(Any, policy), placement, cast(Any, engines), cast(Any, prompts), **options
    )


def test_the_probe_is_of_the_first_prompts_within_the_tolerance_that_was_set(
    model: Path, placement: Placement, tmp_path: Path
) -> None:
    publisher = opened(model, placement, tmp_path, {"probe_tolerance": 0.25})
    assert (publisher._prompts, publisher._tolerance) == (["first", "second"], 0.25)
    assert (publisher._dtype, publisher._pool) == ("float32", "the main rank's")
    assert publisher._record is not None
    assert publisher._record._file == tmp_path / "published.jsonl"


def test_the_doctor_lets_pass_and_records_nothing(model: Path, placement: Placement, tmp_path: Path) -> None:
    publisher = opened(model, placement, tmp_path, {"probe_tolerance": 0.25}, trusting=True)
    assert publisher._tolerance is None and publisher._record is None


def test_ranks_beside_the_main_one_neither_ask_nor_record(
    model: Path, placement: Placement, tmp_path: Path
) -> None:
    publisher = opened(model, replace(placement, rank=1), tmp_path, {})
    assert publisher._pool is None and publisher._record is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("disk", DiskTransport),
        ("distributed", DistributedTransport),
        ("tensor", TensorTransport),
        ("shard", ShardTransport),
    ],
)
def test_the_transport_is_the_one_that_was_chosen(
    name: str, kind: type, model: Path, placement: Placement, tmp_path: Path
) -> None:
    options = {} if name == "disk" else {"bucket_bytes": BUCKET_BYTES}
    way: Any = opened(model, placement, tmp_path, {"transport": name, **options})._transport
    assert type(way) is kind
    if name == "disk":
        assert (way._directory, way._model_path) == (tmp_path / "weights", model)
        return
    if name == "shard":
        assert way._message_bytes == BUCKET_BYTES // 2
        assert (way._vocabulary_multiple, way._dtype) == (8, torch.float32)
        way = way._fallback
        assert type(way) is DistributedTransport
    buckets = way._stream.buckets
    assert {bucket.dtype for bucket in buckets} == {torch.float32}
    assert all(bucket.nbytes <= BUCKET_BYTES // 2 or len(bucket.tensors) == 1 for bucket in buckets)
    assert len({tensor.name for bucket in buckets for tensor in bucket.tensors}) == 15
    assert way._stream._memory is (handle_memory if name == "tensor" else device_memory)
