"""FLOPs by the model's shape against PyTorch's own count, on transformers' models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_rapo.certify.certificate import DEFAULT
from megatron_rapo.config import Adapter, Parallel
from megatron_rapo.data.trees import segment_sizes
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.episode.problem import Problem
from megatron_rapo.job import Job
from megatron_rapo.model.features import Window
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.parameters import count_adapter_parameters
from megatron_rapo.scaling.devices import own_peak_tflops, peak_tflops
from megatron_rapo.scaling.flops import forward_flops, recomputed_flops, training_flops, update_computing
from tests.episodes import group_of, scored_response
from tests.models import make_hf_model

LENGTHS = (7, 40)


FAMILIES = ["qwen2", "qwen3", "llama", "mistral", "smollm3", "olmo2", "glm4", "qwen3_moe", "qwen2_moe"]
FAMILIES += ["mixtral"]
WINDOWED = ["gemma3_text", "olmo3"]  # with a window that holds all, as eager attention computes them


@pytest.mark.parametrize("family", [*FAMILIES, *WINDOWED])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(tmp_path: Path, family: str, tied: bool) -> None:
    wide = {"sliding_window": 64} if family in WINDOWED else {}
    path = make_hf_model(tmp_path / "model", family=family, tied=tied, num_hidden_layers=3, **wide)
    architecture = read_architecture(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager"
    )
    forward = both = 0
    for length in LENGTHS:
        with FlopCounterMode(display=False) as counter:
            logits = model(torch.randint(architecture.vocabulary, (1, length))).logits
        forward += counter.get_total_flops()
        with counter:
            logits.sum().backward()
        both += counter.get_total_flops()
    again = -both
    model.gradient_checkpointing_enable({"use_reentrant": True})  # each layer, to its last product
    model.train()
    for length in LENGTHS:
        logits = model(torch.randint(architecture.vocabulary, (1, length))).logits
        with FlopCounterMode(display=False) as counter:
            logits.sum().backward()
        again += counter.get_total_flops()
    assert recomputed_flops(architecture, LENGTHS) == pytest.approx(again, rel=0.01)
    assert forward_flops(architecture, LENGTHS) == pytest.approx(forward, rel=0.01)
    assert training_flops(architecture, LENGTHS) == pytest.approx(forward + both, rel=0.01)


def test_a_window_is_all_that_its_layers_attend_to() -> None:
    whole, window = DEFAULT, replace(DEFAULT, window=Window(16, (0, 2, 3)))
    channels = 4 * DEFAULT.heads * DEFAULT.head_dim
    saved = forward_flops(whole, LENGTHS) - forward_flops(window, LENGTHS)
    assert saved == 3 * channels * 40 * (40 - 16)
    assert forward_flops(window, [7], [20]) == forward_flops(whole, [7], [20]) - 3 * channels * 7 * (20 - 16)


def groups_of_prompts() -> list[Group]:
    """Three responses of 4, 2 and 6 tokens to a prompt of 10, and one of 1 to a prompt of 5."""
    ids = [np.array([*range(10), *[20 + n] * length], np.int32) for n, length in enumerate((4, 2, 6))]
    groups = [
        group_of(*(scored_response(Outcome.CORRECT, one[10:].tolist(), prompt=range(10)) for one in ids)),
        group_of(scored_response(Outcome.WRONG, [3], prompt=range(5))),
    ]
    groups[0] = replace(groups[0], problem=Problem("0", "", token_ids=tuple(range(10))))
    return groups


def test_what_sequences_share_is_counted_once() -> None:
    groups = groups_of_prompts()
    assert segment_sizes(groups) == ([10, 4, 2, 6, 6], [10, 14, 12, 16, 6])
    assert segment_sizes([group.brief() for group in groups]) == segment_sizes(groups)
    apart = forward_flops(DEFAULT, [14, 12, 16, 6])
    shared = forward_flops(DEFAULT, *segment_sizes(groups))
    of_tokens = forward_flops(DEFAULT, [1] * 20) - forward_flops(DEFAULT, [1] * 20, [0] * 20)
    pairs = 14 * 14 + 12 * 12 + 16 * 16 - (10 * 10 + 4 * 14 + 2 * 12 + 6 * 16)
    assert apart - shared == forward_flops(DEFAULT, [1] * 20, [0] * 20) + of_tokens * pairs // 20


def test_a_run_tells_what_it_computes_again() -> None:
    """20 of 48 tokens; nothing with shared prompts; not where they cannot be shared."""

    def told(share: bool, context: int = 1, recompute: str = "none") -> Any:
        layout = Parallel(context_parallel=context)
        job: Any = SimpleNamespace(
            architecture=DEFAULT,
            placement=SimpleNamespace(layout=layout),
            config=SimpleNamespace(
                algorithm=SimpleNamespace(share_prompts=share),
                parallel=layout,
                observe=SimpleNamespace(peak_tflops=None),
                model=SimpleNamespace(dtype="float32", recompute=recompute),
                adapter=None,
            ),
        )
        return Job._compute(job, SimpleNamespace(groups=groups_of_prompts()), seconds=2.0)  # type: ignore[arg-type]

    apart, shared = told(False), told(True)
    assert apart["compute/repeated_tokens"] == pytest.approx(20 / 48)
    assert shared["compute/repeated_tokens"] == 0.0
    assert "compute/repeated_tokens" not in told(False, context=2)
    of_apart = training_flops(DEFAULT, [14, 12, 16, 6]) / 1e12
    of_shared = training_flops(DEFAULT, *segment_sizes(groups_of_prompts())) / 1e12
    assert [each["compute/update_tflop"] for each in (apart, shared)] == [of_apart, of_shared]
    again = recomputed_flops(DEFAULT, *segment_sizes(groups_of_prompts())) / 1e12
    assert told(True, recompute="full") == {**shared, "compute/recomputed_tflop": again}
    assert shared["compute/recomputed_tflop"] == 0


def test_recomputation_counts_for_the_hardware_alone() -> None:
    """8 TFLOP, and 2 of them again, in 4 seconds of 2 devices that do 10 a second."""
    told = update_computing(8 * 10**12, 2 * 10**12, 8.0, 10.0)
    assert told["throughput/update_tflop_per_s"] == 1.0
    assert (told["throughput/mfu"], told["throughput/hfu"]) == (0.1, 0.125)
    assert not {"throughput/mfu", "throughput/hfu"} & update_computing(1, 0, 1.0, None).keys()


def test_adapters_are_computed_again_with_their_layers() -> None:
    adapter = Adapter(rank=4)
    more = recomputed_flops(DEFAULT, [5], adapter=adapter) - recomputed_flops(DEFAULT, [5])
    assert more == 2 * 5 * count_adapter_parameters(DEFAULT, adapter)


def test_peaks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3") == peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("NVIDIA H20") == 148.0
    assert peak_tflops("GeForce") is None
    assert own_peak_tflops("bfloat16") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert own_peak_tflops("bfloat16") == 989.0
    assert own_peak_tflops("float32") is None
