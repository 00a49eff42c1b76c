"""What adapters make of HF models, on one process: by PEFT, and for experts by plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megatron_rapo.certify.adapted import RandomAdapters, adapted
from megatron_rapo.config import Adapter
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.peft_directory import PREFIX, write_peft_files

ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "alpha": 12.0},
    "attention": {
        "rank": 8,
        "alpha": 6.0,
        "targets": ["q_proj", "v_proj", "o_proj"],
        "rank_stabilized": True,
    },
    "mlp": {"rank": 3, "alpha": 3.0, "targets": ["up_proj", "down_proj"]},
    "mixture": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "experts": {"rank": 3, "alpha": 5.0},
    "experts' down": {"rank": 2, "targets": ["down_proj"], "rank_stabilized": True},
}
APART = "matrices.safetensors"  # of a directory in whose own file those of experts may be joined
LENGTHS, TOKENS = (9, 23, 2, 14, 6, 11), 61


def of_peft(base: Path, model: str, kind: str) -> None:
    """A PEFT adapter with random A and B, and what PEFT makes of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapter = Adapter(**ADAPTERS[kind])
    torch.manual_seed(3)
    hf = AutoModelForCausalLM.from_pretrained(base / model, dtype=torch.float32)
    options = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        target_modules=list(adapter.names),
        use_rslora=adapter.rank_stabilized,
    )
    peft = get_peft_model(hf, options)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    directory = base / f"{model} {kind}"
    peft.save_pretrained(directory)
    found: dict[str, torch.Tensor] = {}
    total = torch.zeros(())
    for index, ids in enumerate(sequences()):
        own = log_probs_of(peft, ids)
        found[f"log_probs {index}"] = own.detach()
        with torch.no_grad(), peft.disable_adapter():
            found[f"reference {index}"] = log_probs_of(peft, ids)
        total = total + (own * weights_of(index, len(own))).sum()
    total.backward()
    for name, parameter in peft.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix(PREFIX).replace(".default.", ".")] = parameter.grad
    torch.save(found, directory / "expected.pt")
    torch.save(dict(peft.merge_and_unload().state_dict()), directory / "merged.pt")


def of_experts(base: Path, model: str, kind: str) -> None:
    """As `of_peft`, but W + scale · B · A is made here: PEFT joins experts' matrices, and their gradients.

    That PEFT makes the same of such an adapter is shown in tests/unit/test_adapted_experts.py.
    """
    from transformers import AutoModelForCausalLM

    adapter, architecture = Adapter(**ADAPTERS[kind]), read_architecture(base / model)
    hf = AutoModelForCausalLM.from_pretrained(base / model, dtype=torch.float32)
    matrices = RandomAdapters(architecture, adapter).all(torch.float32)
    directory = base / f"{model} {kind}"
    directory.mkdir()
    write_peft_files(matrices, architecture, adapter, directory, base / model)
    save_file({PREFIX + name: matrix for name, matrix in matrices.items()}, directory / APART)
    leaves = {name: matrix.clone().requires_grad_() for name, matrix in matrices.items()}
    with HFTensors(base / model) as tensors:
        published = {name: tensors.read(name, None, 0, 0).float() for name in tensors.names()}
    changed = adapted(published, leaves, adapter.scale)
    weights = {name: in_transformers(name, parameter, changed) for name, parameter in hf.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    total = torch.zeros(())

    def with_adapters(token_ids: torch.Tensor) -> Any:
        return torch.func.functional_call(hf, weights, (token_ids,))

    for index, ids in enumerate(sequences()):
        own = log_probs_of(with_adapters, ids)
        found[f"log_probs {index}"] = own.detach()
        with torch.no_grad():
            found[f"reference {index}"] = log_probs_of(hf, ids)
        total = total + (own * weights_of(index, len(own))).sum()
    total.backward()
    found |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    torch.save(found, directory / "expected.pt")
    torch.save({name: tensor.detach() for name, tensor in changed.items()}, directory / "merged.pt")


def in_transformers(
    name: str, parameter: torch.Tensor, published: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """A parameter of transformers' model; of experts, which are one there, of the matrices of each."""
    if name in published:
        return published[name]
    layer, _, which = name.rpartition(".experts.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[which]
    return torch.stack(
        [
            torch.cat([published[f"{layer}.experts.{expert}.{part}.weight"] for part in parts])
            for expert in range(len(parameter))
        ]
    )


def log_probs_of(model: Any, ids: np.ndarray) -> torch.Tensor:
    """Of each token but the first."""
    token_ids = torch.from_numpy(ids).long()
    logits = model(token_ids[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, token_ids[1:, None]).squeeze(1)


def sequences() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(2, TOKENS, length).astype(np.int32) for length in LENGTHS]


def weights_of(index: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(index).normal(size=count)).float()
