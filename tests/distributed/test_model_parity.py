"""Megatron models against HF transformers: logits at every layout, and the weights' round trip."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from megatron_rapo.config import Model, Parallel
from megatron_rapo.convert.to_megatron import convert_to_megatron
from megatron_rapo.data.batching import Microbatch, Sample, pack
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import Body, build_chunks
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.context import gather_tokens, rank_major_order
from megatron_rapo.parallel.placement import Placement, arrange, process_groups
from megatron_rapo.policy.hidden_states import whole_tokens
from megatron_rapo.policy.pipeline import run_forward
from megatron_rapo.weights.buckets import Bucket
from megatron_rapo.weights.export import write_hf_model
from megatron_rapo.weights.gather import StageWeights
from megatron_rapo.weights.load import load_weights
from megatron_rapo.weights.stream import Wait, WeightStream
from megatron_rapo.weights.tensor_table import tensor_table
from tests import own_family  # noqa: F401
from tests.distributed.jobs import layout, run_job
from tests.models import load_reference, make_hf_model

NEW = ("gemma3_text", "olmo2", "olmo3", "glm", "glm4")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = [
    ("qwen2", "dp4"),
    ("qwen2", "tp2-pp2"),
    ("qwen2-tied", "tp2-cp2"),
    ("qwen2-tied", "pp2"),
    ("qwen2-tied", "pp2-vpp2"),
    ("qwen3", "tp2-sp"),
    ("qwen3", "cp2-pp2"),
    ("qwen3-tied", "tp2-pp2-vpp2-sp"),
    ("llama", "tp2-cp2-sp"),
    ("llama", "cp4"),
    ("llama-tied", "pp4"),
    ("llama3-rope", "tp2-pp2"),
    ("qwen2-mha", "tp4"),
    ("mistral", "tp2-pp2"),
    ("smollm3", "pp2-vpp2"),
    ("smollm3-tied", "tp2-cp2-sp"),
    ("seed_oss", "tp2-pp2"),  # from outside of the package
    *((family, name) for family in NEW for name in ("tp2-sp", "pp2", "cp2")),
    ("gemma3_text-tied", "tp2-pp2-vpp2-sp"),
    ("olmo2", "dp4"),
    ("olmo2", "tp2-cp2"),
    ("olmo3-yarn", "tp2-cp2-sp"),
    ("olmo3-yarn", "pp2-vpp2"),
    ("glm", "dp4"),
    ("glm4-tied", "tp2-pp2"),
    ("mistral-window", "tp2-pp2"),
    ("mistral-window", "cp4"),
    ("qwen3-yarn", "tp2-cp2"),
    ("glm4-yarn", "tp2-sp"),
    ("qwen2-linear", "pp2"),
    ("llama-rope", "tp2-pp2"),
    ("qwen3_moe", "tp2-sp"),
    ("qwen3_moe", "pp2-vpp2-ep2"),
    ("qwen3_moe-tied", "tp2-sp-ep2"),
    ("qwen3_moe", "cp2-ep4"),
    ("qwen2_moe", "tp2-sp-etp2"),
    ("qwen2_moe-tied", "tp2-pp2-sp-ep2"),
    ("mixtral", "tp2-sp-ep2-etp2"),
]
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama3-rope": {
        "max_position_embeddings": 16384,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 6.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 5.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2-mha": {"num_key_value_heads": 4},
    "mistral-window": {"sliding_window": 7},
    "qwen3-yarn": {"rope_parameters": YARN},
    "olmo3-yarn": {"rope_parameters": YARN},
    "glm4-yarn": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    "qwen2-linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
}
BUCKET_BYTES = 2 * 15_000  # less than some tensors, more than others
# Two microbatches: sequences of odd lengths packed together, and one alone.
LENGTHS = [[9, 23, 2], [14]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("parity")
    for name in {model for model, _ in CASES}:
        family = name.split("-")[0].rstrip("3") if name.startswith("llama") else name.split("-")[0]
        make_hf_model(base / name, family=family, tied="tied" in name, **OVERRIDES.get(name, {}))
        convert_to_megatron(base / name, base / f"{name} converted")
    return run_job(measure, base, directory=base)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_logits_equal_those_of_transformers(measured: dict[str, Any], model: str, name: str) -> None:
    assert measured[f"{model} {name}"]["difference"] <= 1e-5


@pytest.mark.parametrize(("model", "name"), CASES)
def test_exported_weights_are_bit_equal(measured: dict[str, Any], model: str, name: str) -> None:
    assert measured[f"{model} {name}"]["round_trip"] is True


@pytest.mark.parametrize(("model", "name"), CASES)
def test_megatron_itself_loads_the_converted_checkpoint(
    measured: dict[str, Any], model: str, name: str
) -> None:
    """Megatron's loader, and this package's, which reads slices: both against what the HF model gave."""
    assert measured[f"{model} {name}"]["megatron_loads"] is True
    assert measured[f"{model} {name}"]["package_loads"] is True


@pytest.mark.parametrize(("model", "name"), CASES)
def test_streamed_weights_are_bit_equal(measured: dict[str, Any], model: str, name: str) -> None:
    stream = measured[f"{model} {name}"]["stream"]
    assert stream["same"] is True
    assert stream["buckets"] > 4, "too few buckets to pass each slot more than once"


@pytest.mark.exhaustive
def test_a_mixture_on_eight_ranks_is_transformers(tmp_path: Path) -> None:
    make_hf_model(tmp_path / "qwen3_moe", family="qwen3_moe")
    convert_to_megatron(tmp_path / "qwen3_moe", tmp_path / "qwen3_moe converted")
    found = run_job(measure_on_eight, tmp_path, directory=tmp_path, world_size=8)
    assert found["difference"] <= 1e-5
    assert found["round_trip"] and found["stream"]["same"]
    assert found["megatron_loads"] and found["package_loads"]


def measure_on_eight(base: Path, report: Path) -> None:
    """In each rank: one case, of EP 4 beside TP 2 × PP 2."""
    parallel = Parallel(
        tensor_parallel=2, pipeline_parallel=2, data_parallel=2, expert_parallel=4, sequence_parallel=True
    )
    with process_groups(Parallel(data_parallel=8), seed=1) as everyone:
        found = _measure_case(base / "qwen3_moe", parallel)
        if everyone.is_main:
            report.write_text(json.dumps(found))


def measure(base: Path, report: Path) -> None:
    """In each rank: every case's largest logit difference, and whether its export equals the source."""
    results = {}
    with process_groups(Parallel(data_parallel=4), seed=1) as everyone:
        for model, name in CASES:
            results[f"{model} {name}"] = _measure_case(base / model, layout(name))
        if everyone.is_main:
            report.write_text(json.dumps(results))


def _measure_case(path: Path, parallel: Parallel) -> dict[str, Any]:
    placement = arrange(parallel, seed=1)
    architecture = read_architecture(path)
    chunks = build_chunks(architecture, Model(path=path, dtype="float32"), parallel)
    load_weights(chunks, architecture, path, placement.tensor_rank, placement.expert_tensor_rank)
    microbatches = _microbatches(placement)

    def logits(microbatch: Microbatch, hidden: torch.Tensor) -> tuple[Microbatch, torch.Tensor]:
        return microbatch, whole_tokens(hidden, placement) @ chunks[-1].head_weight.T

    outputs = run_forward(chunks, microbatches, logits)
    difference = torch.tensor(-1.0)
    if placement.is_last_stage:
        difference = torch.tensor(_largest_difference(path, placement, outputs))
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)

    exported = path.parent / "exported"
    write_hf_model(chunks, architecture, placement, exported, companions_of=path)
    round_trip = _same_weights(path, exported) if placement.is_main else None
    checkpoint = path.with_name(f"{path.name} converted")
    return {
        "difference": float(difference),
        "round_trip": round_trip,
        "stream": _stream(path, architecture, chunks, placement),
        "megatron_loads": _same_parameters(chunks, lambda: _load_as_megatron_does(chunks, checkpoint)),
        "package_loads": _same_parameters(
            chunks,
            lambda: load_weights(
                chunks, architecture, checkpoint, placement.tensor_rank, placement.expert_tensor_rank
            ),
        ),
    }


def _load_as_megatron_does(chunks: list[Body], checkpoint: Path) -> None:
    asked = {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    state = dist_checkpointing.load(asked, str(checkpoint / "release"))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{number}"], strict=True)


def _same_parameters(chunks: list[Body], load: Callable[[], None]) -> bool:
    """Whether `load` gives the parameters, overwritten before, their values again; of all ranks."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.fill_(7.0)
    load()
    same = all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, same)
    return all(answers)


def _stream(path: Path, architecture: Architecture, chunks: list[Body], placement: Placement) -> Any:
    """On the main rank: whether what arrives is the HF file, bit by bit, and in how many buckets."""
    weights = StageWeights(chunks, architecture, placement)
    table = tensor_table(architecture, placement.layout)
    here = {t.name for t in table if any(placement.rank in copy for copy in t.holders.copies)}
    assert here == weights.names, "the table says otherwise than the model where tensors are"
    stream = WeightStream(table, weights, placement, torch.float32, BUCKET_BYTES)
    if not placement.is_main:
        stream.run(None)
        return None
    received: dict[str, torch.Tensor] = {}

    def deliver(bucket: Bucket, flat: torch.Tensor) -> Wait:
        return lambda: received.update((t.name, view.clone()) for t, view in bucket.views(flat))

    stream.run(lambda: deliver)
    expected = load_file(path / "model.safetensors")
    same = received.keys() == expected.keys() and all(torch.equal(received[n], expected[n]) for n in expected)
    return {"same": same, "buckets": len(stream.buckets)}


def _sequences() -> list[list[np.ndarray]]:
    random = np.random.default_rng(0)
    return [[random.integers(2, 61, length).astype(np.int32) for length in part] for part in LENGTHS]


def _microbatches(placement: Placement) -> list[Microbatch]:
    parallel = placement.layout
    multiple = 2 * parallel.context_parallel * parallel.tensor_parallel
    parts = [
        [
            Sample(
                Sequence.of_response(ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32), 0), 0.0, 0.0, 1.0
            )
            for ids in part
        ]
        for part in _sequences()
    ]
    total = max(sum(-(-len(s.sequence) // multiple) * multiple for s in part) for part in parts)
    return [
        pack(
            part,
            sequence_multiple=multiple,
            total_tokens=total,
            context_rank=placement.context_rank,
            context_ranks=parallel.context_parallel,
        )
        for part in parts
    ]


def _largest_difference(path: Path, placement: Placement, outputs: list[Any]) -> float:
    reference = load_reference(path)
    vocabulary = reference.config.vocab_size
    worst = 0.0
    for part, (microbatch, logits) in zip(_sequences(), outputs, strict=True):
        shards = [torch.empty_like(logits) for _ in range(placement.layout.tensor_parallel)]
        dist.all_gather(shards, logits.contiguous(), group=placement.tensor_group)
        order = rank_major_order(microbatch.lengths, placement.layout.context_parallel)
        whole = gather_tokens(torch.cat(shards, -1), order, placement.context_group)
        start = 0
        for ids, padded in zip(part, microbatch.lengths, strict=False):
            with torch.no_grad():
                expected = reference(torch.from_numpy(ids).long()[None]).logits[0]
            found = whole[start : start + len(ids), :vocabulary]
            worst = max(worst, float((found - expected).abs().max()))
            start += padded
    return worst


def _same_weights(path: Path, exported: Path) -> bool:
    from transformers import AutoModelForCausalLM

    before, after = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).state_dict() for p in (path, exported)
    )
    return set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
