"""Adapters of a mixture's experts: what PEFT makes of them, what they cost, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_rapo.certify.adapted import RandomAdapters, adapted
from megatron_rapo.config import Adapter
from megatron_rapo.errors import RapoError
from megatron_rapo.model.adapter_rules import adapted_linears
from megatron_rapo.model.architecture import Experts
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.parameters import count_adapter_parameters, count_expert_adapter_parameters
from megatron_rapo.scaling.flops import recomputed_flops, training_flops
from megatron_rapo.weights.peft_directory import write_peft_files
from tests.models import make_hf_model
from tests.unit.test_memory import QWEN2_7B, estimate

MLP = ["gate_proj", "up_proj", "down_proj"]
MIXTURE = replace(QWEN2_7B, family="qwen3_moe", experts=Experts(8, 2, renormalised=True))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"rank_stabilized": True, "targets": MLP}),
        ("qwen2_moe", {}),
        ("qwen2_moe", {"rank_stabilized": True, "targets": ["v_proj", "down_proj"]}),
        ("mixtral", {}),
        ("mixtral", {"targets": ["q_proj", "down_proj"]}),
    ],
)
def test_peft_makes_the_model_of_them_that_engines_get(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    """W + scale · B · A of each expert."""
    from peft import PeftModel

    base, merged = make_hf_model(tmp_path / "base", family=family), tmp_path / "merged"
    adapter = Adapter(rank=3, alpha=5.0, **options)
    architecture = read_architecture(base)
    matrices = RandomAdapters(architecture, adapter).all(torch.float32)
    (tmp_path / "adapter").mkdir()
    write_peft_files(matrices, architecture, adapter, tmp_path / "adapter", base)
    merged.mkdir()
    weights = adapted(load_file(base / "model.safetensors"), matrices, adapter.scale)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    (merged / "config.json").write_text((base / "config.json").read_text())

    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        plain, expected = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (base, merged)
        )
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        found = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids).logits
    assert (expected - plain).abs().max() > 0.1
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("alone", ["gate_proj", "up_proj"])
def test_gate_and_up_projections_of_experts_are_adapted_together(alone: str) -> None:
    with pytest.raises(RapoError, match=rf"has {alone} alone; .* PEFT .*; name both, or"):
        list(adapted_linears(MIXTURE, Adapter(targets=["q_proj", alone])))
    list(adapted_linears(QWEN2_7B, Adapter(targets=["q_proj", alone])))


def test_each_expert_has_its_own() -> None:
    linears = [linear.name for linear in adapted_linears(MIXTURE, Adapter(targets=MLP))]
    assert linears == [f"mlp.experts.{e}.linear_fc{n}" for e in range(8) for n in (1, 2)]
    matrix = 5 * (3584 + 18944)
    assert count_expert_adapter_parameters(MIXTURE, Adapter(rank=5, targets=MLP)) == 28 * 8 * 3 * matrix
    assert count_expert_adapter_parameters(QWEN2_7B, Adapter()) == 0


def test_a_token_passes_the_adapters_of_experts_that_it_chooses() -> None:
    both, attention = Adapter(rank=5), Adapter(rank=5, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    more, again = (
        flops(MIXTURE, [7], adapter=both) - flops(MIXTURE, [7], adapter=attention)
        for flops in (training_flops, recomputed_flops)
    )
    chosen = 28 * 2 * 3 * 5 * (3584 + 18944)
    assert more == 3 * 2 * 7 * chosen  # forward, and a backward of twice as many products
    assert again == 2 * 7 * chosen


def test_memory_has_states_of_a_ranks_own_experts_adapters() -> None:
    """Of 8 experts 4, of which TP cuts neither: those that have the same are 2 of 4 ranks."""
    adapter = Adapter(rank=5, targets=MLP)
    layout = {"parallel": {"data_parallel": 4, "expert_parallel": 2}}
    found = estimate(MIXTURE, **layout, adapter=adapter.model_dump())
    own = count_adapter_parameters(MIXTURE, adapter) // 2
    assert found.gradients == 4 * own
    assert found.optimizer == 12 * (own // 2)
    cut = {"parallel": {"tensor_parallel": 2, "expert_tensor_parallel": 2}}
    rows, columns = 5 * 3584, 5 * 18944 // 2  # A of two whole, B of one; the others cut
    assert estimate(MIXTURE, **cut, adapter=adapter.model_dump()).gradients == 4 * 28 * 8 * 3 * (
        rows + columns
    )
