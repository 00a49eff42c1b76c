"""A whole model's weights in one process: as Megatron has them, as HF has them, and as an engine gets them.

The truth is the HF model's own file. What several ranks exchange, tests/distributed has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.config import Model, Weights
from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import build_chunks
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.publish.opening import open_transport
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.weights import export
from megatron_rapo.weights.export import hf_tensors, write_hf_model
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.load import load_weights
from megatron_rapo.weights.parameter_map import mapped_parameters
from megatron_rapo.weights.transports import tensor
from megatron_rapo.weights.transports.tensor import TensorTransport, handle_memory
from tests.models import make_hf_model
from tests.unit.one_rank import one_placement

FAMILIES = {"qwen2": False, "qwen3": True}  # with biases and a head of its own; with norms, tied
TRANSPORTS = ["distributed", "tensor", "shard", "disk"]
BUCKET_BYTES = 30_000  # several buckets of several tensors, and tensors that go alone


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as alone:
        yield alone


@pytest.fixture(scope="module", params=list(FAMILIES))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return make_hf_model(folder, family=request.param, tied=FAMILIES[request.param], num_hidden_layers=2)


@pytest.fixture(scope="module")
def architecture(path: Path) -> Architecture:
    return read_architecture(path)


@pytest.fixture
def chunks(path: Path, architecture: Architecture, placement: Placement) -> Any:
    built = build_chunks(architecture, Model(path=path, dtype="float32"), placement.layout)
    load_weights(built, architecture, path, placement.tensor_rank)
    return built


def test_attention_is_laid_out_as_megatron_computes_it(
    path: Path, architecture: Architecture, chunks: Any
) -> None:
    """Megatron splits a fused row block into [query heads of a group, its key, its value]."""
    file, dim = load_file(path / "model.safetensors"), architecture.head_dim
    per_group = architecture.heads // architecture.kv_heads
    for layer in range(architecture.layers):
        fused = chunks[0].decoder.layers[layer].self_attention.linear_qkv
        kinds = ["weight", "bias"] if architecture.attention_bias else ["weight"]
        for kind in kinds:
            query, key, value = (
                file[f"model.layers.{layer}.self_attn.{name}_proj.{kind}"] for name in ("q", "k", "v")
            )
            for group in range(architecture.kv_heads):
                rows = getattr(fused, kind)[group * (per_group + 2) * dim :][: (per_group + 2) * dim]
                assert torch.equal(
                    rows[: per_group * dim], query[group * per_group * dim :][: per_group * dim]
                )
                assert torch.equal(rows[per_group * dim :][:dim], key[group * dim :][:dim])
                assert torch.equal(rows[-dim:], value[group * dim :][:dim])


def test_the_gate_comes_before_the_other_half(path: Path, architecture: Architecture, chunks: Any) -> None:
    """Megatron's SwiGLU applies SiLU to the first half of the rows."""
    file, mlp = load_file(path / "model.safetensors"), "model.layers.1.mlp"
    first, second = chunks[0].decoder.layers[1].mlp.linear_fc1.weight.chunk(2)
    assert torch.equal(first, file[f"{mlp}.gate_proj.weight"])
    assert torch.equal(second, file[f"{mlp}.up_proj.weight"])


def test_what_is_exported_is_what_was_loaded(
    path: Path, architecture: Architecture, chunks: Any, placement: Placement, tmp_path: Path
) -> None:
    expected = load_file(path / "model.safetensors")
    exported = dict(hf_tensors(chunks, architecture, placement))
    assert exported.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(exported[name], values), name
    checksums = write_hf_model(chunks, architecture, placement, tmp_path / "out", companions_of=path)
    assert checksums == {name: tensor_checksum(values) for name, values in expected.items()}
    written = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(written[name], values) for name, values in expected.items())
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_that_cannot_be_written_leaves_nothing(
    path: Path,
    architecture: Architecture,
    chunks: Any,
    placement: Placement,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("save_tensors", "write_companions"):
        with monkeypatch.context() as patch:
            patch.setattr(export, name, full)
            with pytest.raises(RapoError, match="out: No space left on device; free space"):
                write_hf_model(chunks, architecture, placement, tmp_path / "out", companions_of=path)
        assert list(tmp_path.iterdir()) == []


def test_a_model_is_written_in_files_of_a_size(
    path: Path,
    architecture: Architecture,
    chunks: Any,
    placement: Placement,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "FILE_BYTES", 100_000)
    for _ in range(2):  # the second takes the place of the first
        write_hf_model(chunks, architecture, placement, tmp_path / "out", companions_of=path)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = [sum(values.nbytes for values in load_file(file).values()) for file in files]
    assert len(files) > 2 and max(sizes) <= 100_000
    with HFTensors(tmp_path / "out") as written:
        for name, values in load_file(path / "model.safetensors").items():
            assert torch.equal(written.read(name, None, 0, 0), values)


def test_a_tied_head_is_loaded_like_the_embedding_and_never_exported(architecture: Architecture) -> None:
    """Pipeline stages have a copy of it at the end."""
    last = SimpleNamespace(
        named_parameters=lambda: [("output_layer.weight", torch.nn.Parameter(torch.ones(1)))]
    )
    [head] = mapped_parameters(cast(Any, [last]), architecture)
    assert head.rule.copy is architecture.tied
    assert list(head.rule.hf) == ["model.embed_tokens.weight" if architecture.tied else "lm_head.weight"]


def test_handles_are_of_shared_memory_and_too_little_of_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = handle_memory(100)
    assert (memory.shape, memory.dtype, memory.is_shared()) == ((100,), torch.uint8, True)
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr(tensor.shutil, "disk_usage", lambda _: usage)
    handle_memory(2**20)
    with pytest.raises(
        RapoError, match=r"has 1 MiB left, a bucket of weights needs 3: .*weights\.bucket_bytes"
    ):
        handle_memory(3 * 2**20)


def test_engines_of_another_machine_get_no_handles() -> None:
    engines = SimpleNamespace(urls=["http://localhost:1", "http://10.0.0.1:2"])
    way = TensorTransport(cast(Any, None))
    with pytest.raises(RapoError, match=r'"tensor" cannot reach http://10\.0\.0\.1:2: .*use "distributed"'):
        way._prepare(cast(Any, engines))


@pytest.fixture(scope="module")
def pool(
    path: Path, architecture: Architecture, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EnginePool]:
    launcher = EmbeddedLauncher(path, "cpu", "float32", threads=1)
    logs = tmp_path_factory.mktemp("logs")
    with (
        LocalServers(launcher, EmbeddedClient, count=1, log_directory=logs, startup_timeout=120.0) as servers,
        EnginePool(
            servers.urls,
            EmbeddedClient,
            vocab_size=architecture.vocabulary,
            prompts_per_request=1,
            request_timeout=60.0,
        ) as opened,
    ):
        yield opened


@pytest.mark.parametrize("path", ["qwen2"], indirect=True)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_engine_gets_every_tensor_twice_in_a_row(
    transport: str,
    path: Path,
    architecture: Architecture,
    chunks: Any,
    placement: Placement,
    pool: EnginePool,
    tmp_path: Path,
) -> None:
    """The second publication finds group, buffers and files of the first."""
    model = Model(path=path, dtype="float32")
    options = {} if transport == "disk" else {"bucket_bytes": BUCKET_BYTES}
    weights = Weights.model_validate({"transport": transport, **options})
    way = open_transport(weights, model, chunks, architecture, placement, tmp_path / "weights")
    file = load_file(path / "model.safetensors")
    first = 10 * TRANSPORTS.index(transport)
    for version in (first + 1, first + 2):
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.mul_(0.5)  # exact
        sent = way.send(pool, version)
        factor = 0.5 ** (version - first)
        expected = {name: tensor_checksum(values * factor) for name, values in file.items()}
        [arrived] = pool.weights_checksums("float32").values()
        assert arrived == expected
        if transport in ("distributed", "tensor"):
            assert sent == expected
    assert pool._loop.run(pool._members.live[0].client.weight_version()) == str(first + 2)
