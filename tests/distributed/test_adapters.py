"""Adapters under every layout against PEFT on HF models: logits, gradients, exports; and their reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_rapo.config import Adapter, Model, Optimizer, Parallel
from megatron_rapo.data.batching import Microbatch, Sample, pack, padded_length, plan_microbatches
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.model.adapters import LowRank, without_adapters
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import Body, build_chunks
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement, arrange, process_groups
from megatron_rapo.policy.gradients import main_gradient, unwrap, wrap
from megatron_rapo.policy.hidden_states import shared_tokens
from megatron_rapo.policy.pipeline import run_forward_backward
from megatron_rapo.policy.policy import _megatron_optimizer
from megatron_rapo.policy.reference import PolicyWithoutAdapters
from megatron_rapo.weights.export import hf_tensors
from megatron_rapo.weights.fresh_adapters import begin_adapters
from megatron_rapo.weights.load import fill, load_weights
from megatron_rapo.weights.parameter_map import mapped_parameters
from megatron_rapo.weights.peft_directory import PREFIX, write_peft_adapter
from tests.distributed.adapted_models import (
    ADAPTERS,
    APART,
    LENGTHS,
    TOKENS,
    of_experts,
    of_peft,
    sequences,
    weights_of,
)
from tests.distributed.jobs import layout, run_job
from tests.models import make_hf_model

# model, adapter, recompute, layout
CASES = [
    ("qwen2", "all", "none", "dp4"),
    ("qwen2", "all", "none", "tp2-dp2"),
    ("qwen2", "all", "none", "tp2-sp"),
    ("qwen2", "all", "none", "pp2"),
    ("qwen2", "all", "none", "cp2"),
    ("qwen2", "all", "full", "dp4"),
    ("qwen2", "attention", "full", "tp2-sp-pp2"),
    ("qwen2", "mlp", "none", "tp2-cp2"),
    ("qwen3-tied", "all", "none", "tp2-pp2-vpp2-sp"),
    ("qwen3-tied", "attention", "none", "pp2"),
    ("llama", "mlp", "none", "tp2-sp"),
    ("qwen3_moe", "mixture", "none", "tp2-sp-ep2"),
    ("qwen3_moe", "experts", "full", "tp2-sp-ep2"),
    ("qwen3_moe", "experts", "none", "pp2-ep2"),
    ("qwen2_moe", "experts", "none", "tp2-sp-ep2-etp2"),
    ("qwen3_moe", "experts' down", "none", "dp4-etp2"),
    ("gemma3_text", "all", "full", "tp2-sp-pp2"),
    ("olmo2", "all", "none", "tp2-pp2"),
    ("glm4", "attention", "none", "tp2-sp"),
]
IDS = ["/".join(case) for case in CASES]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("adapters")
    for name, kind in {(model, adapter) for model, adapter, _, _ in CASES}:
        if not (base / name).exists():
            make_hf_model(base / name, family=name.split("-")[0], tied="tied" in name)
        (of_experts if kind.startswith("experts") else of_peft)(base, name, kind)
    return run_job(measure, base, directory=base)


@pytest.mark.parametrize("case", IDS)
def test_log_probs_equal_those_of_peft(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["log_probs"] <= 1e-5


@pytest.mark.parametrize("case", IDS)
def test_gradients_of_a_and_b_equal_those_of_peft(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["gradients"] <= 1e-5


@pytest.mark.parametrize("case", IDS)
def test_each_gradient_is_in_the_norm_once(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["norm"] == pytest.approx(measured[case]["norm_of_gradients"], rel=1e-5)


@pytest.mark.parametrize("case", IDS)
def test_the_exported_adapter_is_that_of_peft_bit_for_bit(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["exported"] is True


@pytest.mark.parametrize("case", IDS)
def test_merged_weights_equal_those_of_peft(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["merged"] <= 1e-6


@pytest.mark.parametrize("case", IDS)
def test_the_reference_is_the_model_without_adapters(measured: dict[str, Any], case: str) -> None:
    """And left on, they would show: B is not 0 here."""
    assert measured[case]["reference"] <= 1e-5
    assert measured[case]["left_on"] > 1e-2


@pytest.mark.parametrize("case", IDS)
def test_only_adapters_have_gradients(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["others"] == []


def test_every_layout_begins_with_the_same_adapters_as_peft_draws_them(measured: dict[str, Any]) -> None:
    for model, adapter in {(model, adapter) for model, adapter, _, _ in CASES}:
        found = [measured[i]["begun"] for i, c in zip(IDS, CASES, strict=True) if c[:2] == (model, adapter)]
        assert all(one == found[0] for one in found)
    begun = measured["qwen2/all/none/dp4"]["begun"]
    assert begun["zero"] is True
    for columns, (largest, deviation) in begun["drawn"].items():
        bound = int(columns) ** -0.5
        assert 0.97 * bound < largest <= bound
        assert deviation == pytest.approx(bound / 3**0.5, rel=0.05)


def measure(base: Path, report: Path) -> None:
    """In each rank: every case."""
    results = {}
    with process_groups(Parallel(data_parallel=4), seed=1) as everyone:
        for case, (model, kind, recompute, name) in zip(IDS, CASES, strict=True):
            adapter = Adapter(**ADAPTERS[kind])
            found = _measure(base / model, base / f"{model} {kind}", adapter, recompute, layout(name))
            results[case] = found
        if everyone.is_main:
            report.write_text(json.dumps(results))


class Directory:
    """A PEFT directory's tensors, for `fill`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        apart = directory / APART
        self._tensors = load_file(apart if apart.exists() else directory / "adapter_model.safetensors")

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[PREFIX + name].shape)

    def read(self, name: str, dimension: int | None, start: int, stop: int) -> torch.Tensor:
        whole = self._tensors[PREFIX + name]
        return whole if dimension is None else whole.narrow(dimension, start, stop - start)


def _measure(
    path: Path, directory: Path, adapter: Adapter, recompute: Any, parallel: Parallel
) -> dict[str, Any]:
    placement = arrange(parallel, seed=1)
    architecture = read_architecture(path)
    model = Model(path=path, dtype="float32", recompute=recompute)
    chunks = build_chunks(architecture, model, parallel, adapter=adapter)
    load_weights(chunks, architecture, path, placement.tensor_rank, placement.expert_tensor_rank)
    ranks = placement.tensor_rank, placement.expert_tensor_rank
    begin_adapters(chunks, architecture, adapter, 5, *ranks)
    begun = _begun(_everyone(hf_tensors(chunks, architecture, placement, adapter=adapter)))
    of_peft = Directory(directory)
    for mapped in mapped_parameters(chunks, architecture, adapter):
        fill(mapped, of_peft, architecture, placement.tensor_rank, placement.expert_tensor_rank)

    expected = torch.load(directory / "expected.pt")
    microbatches = _microbatches(placement)
    reference = PolicyWithoutAdapters(chunks, placement)
    found = _log_probs_of_frozen(reference, chunks, microbatches, placement)
    wrapped = wrap(chunks, Optimizer(distributed=False))
    for chunk in wrapped:
        chunk.zero_grad_buffer()

    def loss(microbatch: Microbatch, hidden: torch.Tensor) -> tuple[torch.Tensor, Any]:
        own = _log_probs(shared_tokens(hidden, placement), microbatch, chunks, placement)
        chosen = own[microbatch.is_response]
        return (chosen * microbatch.weights[microbatch.is_response]).sum(), own.detach()

    reports = run_forward_backward(wrapped, microbatches, loss)
    gradients = _everyone(hf_tensors(chunks, architecture, placement, main_gradient, adapter))
    merged = _everyone(hf_tensors(chunks, architecture, placement))
    optimizer = _megatron_optimizer(wrapped, Optimizer(distributed=False), torch.float32)
    optimizer.prepare_grads()
    others = [
        name
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if ".adapter." not in name and (parameter.requires_grad or hasattr(parameter, "main_grad"))
    ]
    exported = directory.with_name("exported")
    write_peft_adapter(chunks, architecture, placement, adapter, exported, path)
    same = _same_in_peft(exported, directory, path) if placement.is_main else None
    unwrap(wrapped)
    return {
        "log_probs": _apart(reports, microbatches, expected, "log_probs", placement),
        "reference": _apart(found, microbatches, expected, "reference", placement),
        "left_on": _apart(reports, microbatches, expected, "reference", placement),
        "gradients": _relative(gradients, expected),
        "norm": float(optimizer.get_grad_norm()),
        "norm_of_gradients": float(torch.stack([one.norm() for one in gradients.values()]).norm()),
        "merged": _merged_apart(merged, torch.load(directory / "merged.pt"), architecture),
        "exported": same,
        "others": others,
        "begun": begun,
    }


def _begun(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Whether all B are 0, and of A by its columns the largest magnitude and the standard deviation."""
    drawn: dict[int, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if "lora_A" in name:
            drawn.setdefault(tensor.size(1), []).append(tensor.flatten())
    return {
        "zero": not any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name),
        "drawn": {
            columns: [float(torch.cat(own).abs().max()), float(torch.cat(own).std())]
            for columns, own in sorted(drawn.items())
        },
    }


def _log_probs(
    tokens: torch.Tensor, microbatch: Microbatch, chunks: list[Body], placement: Placement
) -> torch.Tensor:
    """Of each place's target, over a head that TP shares."""
    logits = tokens @ chunks[-1].head_weight.T
    if placement.layout.tensor_parallel > 1:
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        logits = gather_from_tensor_model_parallel_region(logits, group=placement.tensor_group)
    return logits[:, :TOKENS].log_softmax(-1).gather(1, microbatch.targets[:, None]).squeeze(1)


def _log_probs_of_frozen(
    reference: PolicyWithoutAdapters, chunks: list[Body], microbatches: list[Microbatch], placement: Placement
) -> list[torch.Tensor]:
    states = reference._hidden_states(microbatches)
    assert all(m.on for chunk in chunks for m in chunk.modules() if isinstance(m, LowRank))
    with torch.no_grad():
        return [
            _log_probs(shared_tokens(hidden, placement), microbatch, chunks, placement)
            for hidden, microbatch in zip(states, microbatches, strict=False)
        ]


def _microbatches(placement: Placement) -> list[Microbatch]:
    parallel = placement.layout
    multiple = 2 * parallel.context_parallel * parallel.tensor_parallel
    samples = [
        Sample(Sequence.of_response(ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32), 0), 0.0, 0.0, 1.0)
        for ids in sequences()
    ]
    plan = plan_microbatches(
        [padded_length(len(sample.sequence), multiple) for sample in samples],
        replicas=parallel.data_parallel,
        token_budget=64,
        count_multiple=parallel.pipeline_parallel if parallel.virtual_pipeline_parallel else 1,
    )[placement.data_rank]
    packed = []
    for numbers in plan:
        microbatch = pack(
            [samples[number] for number in numbers],
            sequence_multiple=multiple,
            total_tokens=64,
            context_rank=placement.context_rank,
            context_ranks=parallel.context_parallel,
        )
        chosen = microbatch.is_response
        own = torch.tensor(numbers)[microbatch.sequences[chosen]] if numbers else torch.empty(0).long()
        places = microbatch.response_positions[chosen]
        microbatch.numbers = own  # type: ignore[attr-defined]
        microbatch.weights[chosen] = torch.tensor(
            [float(weights_of(int(n), len(sequences()[n]) - 1)[p]) for n, p in zip(own, places, strict=True)]
        )
        packed.append(microbatch)
    return packed


def _apart(
    found: list[torch.Tensor],
    microbatches: list[Microbatch],
    expected: dict[str, torch.Tensor],
    what: str,
    placement: Placement,
) -> float:
    worst = torch.tensor(0.0)
    seen = torch.tensor(0.0)
    if placement.is_last_stage:
        for own, microbatch in zip(found, microbatches, strict=True):
            chosen = microbatch.is_response
            places = microbatch.response_positions[chosen]
            for value, number, place in zip(
                own[chosen],
                microbatch.numbers,  # type: ignore[attr-defined]
                places,
                strict=True,
            ):
                worst = torch.maximum(worst, (value - expected[f"{what} {int(number)}"][place]).abs())
                seen += 1
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    dist.all_reduce(seen)
    assert seen >= sum(LENGTHS) - len(LENGTHS)
    return float(worst)


def _everyone(tensors: Any) -> dict[str, torch.Tensor]:
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, dict(tensors))
    return {name: tensor for share in shares for name, tensor in share.items()}


def _relative(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    wanted = {name: tensor for name, tensor in expected.items() if "lora" in name}
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)


def _merged_apart(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], architecture: Architecture
) -> float:
    both = [name for name in found if name in expected]
    assert len(both) == len(found) or architecture.experts is not None
    return max(float((found[name] - expected[name]).abs().max()) for name in both)


def _same_in_peft(exported: Path, directory: Path, path: Path) -> bool:
    """What peft loads of the directory has the very logits of the adapter that it saved itself."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(sequences()[1]).long()[None]
    logits = []
    for own in (exported, directory):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(model, own).eval()(ids).logits)
    return torch.equal(*logits)


def test_adapters_that_fail_are_on_again() -> None:
    chunk = torch.nn.Module()
    chunk.low_rank = LowRank.__new__(LowRank)
    torch.nn.Module.__init__(chunk.low_rank)
    chunk.low_rank.on = True
    with pytest.raises(ValueError, match="inside"), without_adapters([chunk]):
        assert not chunk.low_rank.on
        raise ValueError("inside")
    assert chunk.low_rank.on
