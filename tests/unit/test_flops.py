"""FLOPs by the model's shape against PyTorch's own count, on transformers' models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.scaling.devices import own_peak_tflops, peak_tflops
from megatron_rapo.scaling.flops import forward_flops, training_flops
from tests.models import make_hf_model

LENGTHS = (7, 40)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "smollm3"])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(tmp_path: Path, family: str, tied: bool) -> None:
    path = make_hf_model(tmp_path / "model", family=family, tied=tied, num_hidden_layers=3)
    architecture = read_architecture(path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    forward = both = 0
    for length in LENGTHS:
        with FlopCounterMode(display=False) as counter:
            logits = model(torch.randint(architecture.vocabulary, (1, length))).logits
        forward += counter.get_total_flops()
        with counter:
            logits.sum().backward()
        both += counter.get_total_flops()
    assert forward_flops(architecture, LENGTHS) == pytest.approx(forward, rel=0.01)
    assert training_flops(architecture, LENGTHS) == pytest.approx(forward + both, rel=0.01)


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
