"""This replica's shards as whole HF tensors, and as a HF model directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors.torch import save_file
from torch import Tensor

from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.parameter_map import mapped_parameters

FILE_BYTES = 4 << 30
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
)


def hf_tensors(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    placement: Placement,
    value: Callable[[torch.nn.Parameter], Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """This stage's HF tensors, whole, one at a time, in host memory; on TP rank 0, others yield nothing.

    All TP ranks of the stage must exhaust it together. `value` says what of a parameter is exported: itself,
    or a tensor of its shape (its gradient, say).
    """
    group = placement.tensor_group
    for mapped in mapped_parameters(chunks, architecture):
        if not mapped.exported:
            continue
        parts = mapped.fusion.split(value(mapped.parameter), architecture)
        for name, part in zip(mapped.hf, parts, strict=True):
            whole = part
            if mapped.cut is not None and group.size() > 1:
                shards = [torch.empty_like(part) for _ in range(group.size())]
                dist.all_gather(shards, part.contiguous(), group=group)
                whole = torch.cat(shards, dim=mapped.cut)
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                whole = whole[: architecture.vocabulary]
            if placement.tensor_rank == 0:
                yield name, whole.to("cpu", copy=True).contiguous()


def write_hf_model(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    placement: Placement,
    directory: Path,
    companions_of: Path,
) -> None:
    """Writes a HF model directory that transformers and SGLang load; replica 0's stages write in parallel.

    Args:
        directory: where to; it appears whole or not at all.
        companions_of: HF directory whose config.json, tokenizer and generation files are carried over.

    All ranks must call it.

    Raises:
        RapoError: the directory cannot be written; nothing is left of it.
    """
    partial = directory.with_name(directory.name + ".partial")
    failure: str | None = None
    files: dict[str, str] = {}
    if placement.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier(group=placement.host_group)
    if placement.data_rank == 0 and placement.context_rank == 0:
        tensors = hf_tensors(chunks, architecture, placement)
        try:
            files = _write_files(tensors, partial, stage=placement.pipeline_rank)
        except OSError as error:
            failure = f"{error.strerror or error}"
            for _ in tensors:  # the other TP ranks of the stage are still gathering
                pass
    written: list[tuple[dict[str, str], str | None]] = [({}, None)] * dist.get_world_size()
    dist.all_gather_object(written, (files, failure), group=placement.host_group)
    failure = next((text for _, text in written if text), None)
    if placement.is_main and failure is None:
        weight_map = {name: file for part, _ in written for name, file in part.items()}
        failure = _finish_directory(partial, directory, weight_map, companions_of)
    failure = placement.share_from_main(failure)
    if failure is not None:
        if placement.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise RapoError(
            f"model cannot be written to {directory}: {failure}; free space or choose another place"
        )


def _write_files(tensors: Iterator[tuple[str, Tensor]], directory: Path, stage: int) -> dict[str, str]:
    """Saves tensors in files of at most FILE_BYTES; returns which tensor went into which file."""
    files: dict[str, str] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if not pending:
            return
        directory.mkdir(parents=True, exist_ok=True)
        file = f"model-stage{stage:02d}-{len(set(files.values())):05d}.safetensors"
        try:
            save_file(pending, directory / file, metadata={"format": "pt"})
        except Exception as error:  # safetensors reports a full disk as its own error type
            raise OSError(None, str(error)) from error
        files.update(dict.fromkeys(pending, file))
        pending.clear()

    for name, tensor in tensors:
        if sum(t.nbytes for t in pending.values()) + tensor.nbytes > FILE_BYTES:
            flush()
        pending[name] = tensor
    flush()
    return files


def _finish_directory(
    partial: Path, directory: Path, weight_map: dict[str, str], companions_of: Path
) -> str | None:
    """Adds index and companion files, and moves the directory into place; returns what failed."""
    try:
        index = {"metadata": {}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        for name in COMPANIONS:
            if (companions_of / name).is_file():
                shutil.copyfile(companions_of / name, partial / name)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    except OSError as error:
        return f"{error.strerror or error}"
    return None
