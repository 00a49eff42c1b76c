"""Adapters as PEFT has them: a directory that `peft.PeftModel.from_pretrained` loads on the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rapo.config import Adapter
from megatron_rapo.errors import RapoError
from megatron_rapo.file_sums import write_sums
from megatron_rapo.model.adapter_rules import A, adapts_experts
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.export import hf_tensors
from megatron_rapo.weights.hf_directory import save_tensors
from megatron_rapo.weights.peft_experts import CONVERTED, GATE_UP, joined

WEIGHTS, OPTIONS = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of names there, before the model's own


def write_peft_adapter(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    placement: Placement,
    adapter: Adapter,
    directory: Path,
    base: Path,
) -> None:
    """Writes the policy's adapters as a PEFT directory. All ranks must call it; the main rank writes.

    Args:
        chunks: this rank's.
        architecture: of the model.
        placement: this rank's.
        adapter: the adapters' options.
        directory: where to; it appears whole or not at all.
        base: HF directory of the model that they are adapters of.

    Raises:
        RapoError: the directory cannot be written; nothing is left of it.
    """
    mine = dict(hf_tensors(chunks, architecture, placement, adapter=adapter))
    shares: list[dict[str, Tensor]] | None = [{}] * placement.layout.world_size if placement.is_main else None
    dist.gather_object(mine, shares, group=placement.host_group)
    failure = None
    if shares is not None:
        partial = directory.with_name(directory.name + ".partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            whole = {name: own for share in shares for name, own in share.items()}
            write_peft_files(whole, architecture, adapter, partial, base)
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
        except OSError as error:
            failure = f"{error.strerror or error}"
            shutil.rmtree(partial, ignore_errors=True)
    failure = placement.share_from_main(failure)
    if failure is not None:
        raise RapoError(
            f"adapters cannot be written to {directory}: {failure}; free space or choose another place"
        )


def write_peft_files(
    tensors: Mapping[str, Tensor], architecture: Architecture, adapter: Adapter, directory: Path, base: Path
) -> None:
    """Writes the files of such a directory, with their checksums.

    Args:
        tensors: A and B of each matrix, by its HF name.
        architecture: of the model.
        adapter: their options.
        directory: an empty folder.
        base: HF directory of the model.

    Raises:
        OSError: it cannot be written.
    """
    options = _options(architecture, adapter, base, tensors)
    if adapts_experts(architecture, adapter) and architecture.family not in CONVERTED:
        tensors, options["target_parameters"] = joined(tensors)
        twice = rf".*\.{GATE_UP}"
        options["rank_pattern"] = {twice: 2 * options["r"]}
        options["alpha_pattern"] = {twice: 2 * options["lora_alpha"]}
    save_tensors({PREFIX + name: own.contiguous() for name, own in tensors.items()}, directory / WEIGHTS)
    (directory / OPTIONS).write_text(json.dumps(options, indent=1) + "\n")
    write_sums(directory)


def _options(
    architecture: Architecture, adapter: Adapter, base: Path, names: Iterable[str]
) -> dict[str, Any]:
    """PEFT's, of matrices of these names, whose layers are called as the model's published weights are."""
    layers = sorted({name.split(f".{A}.")[0].rpartition(".")[2] for name in names if f".{A}." in name})
    # PEFT makes one matrix of experts' gate and up projections, of twice the rank and alpha: the scale stays
    # what it is if it is alpha / rank, and not if it is alpha / √rank.
    of_experts = adapts_experts(architecture, adapter)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank if of_experts else adapter.alpha,
        "use_rslora": adapter.rank_stabilized and not of_experts,
        "target_modules": layers,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
