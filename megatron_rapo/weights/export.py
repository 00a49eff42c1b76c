"""The ranks' shards as whole HF tensors, and as a HF model directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.config import Adapter
from megatron_rapo.errors import RapoError
from megatron_rapo.file_sums import Sums, sum_of, write_sums
from megatron_rapo.model.adapters import merged
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.gather import StageWeights
from megatron_rapo.weights.hf_directory import save_tensors, write_companions
from megatron_rapo.weights.tensor_table import tensor_table

FILE_BYTES = 512 << 20  # a stage holds as many in host memory


def hf_tensors(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    placement: Placement,
    value: Callable[[torch.nn.Parameter], Tensor] = merged,
    adapter: Adapter | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors that this rank collects, whole, one at a time, in host memory.

    Over all ranks that is each tensor once. All must exhaust it together. `value` and `adapter` say what is
    exported, as for `StageWeights`.
    """
    weights = StageWeights(chunks, architecture, placement, value, adapter)
    for tensor in tensor_table(architecture, placement.layout, adapter):
        if placement.rank not in tensor.holders.senders:
            continue
        whole = None
        if placement.rank == tensor.holders.collector:
            local = weights.local(tensor.name)
            whole = torch.empty(tensor.shape, dtype=local.dtype, device=local.device)
        weights.gather(tensor, whole)
        if whole is not None:
            yield tensor.name, whole.cpu()


def write_hf_model(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    placement: Placement,
    directory: Path,
    companions_of: Path,
) -> dict[str, int]:
    """Writes a HF model directory that transformers and SGLang load; who collects tensors writes them.

    Args:
        directory: where to; it appears whole or not at all.
        companions_of: HF directory whose config.json, tokenizer and generation files are carried over.

    All ranks must call it.

    Returns:
        The checksum of each tensor, on all ranks.

    Raises:
        RapoError: the directory cannot be written; nothing is left of it.
    """
    partial = directory.with_name(directory.name + ".partial")
    failure: str | None = None
    files: dict[str, str] = {}
    checksums: dict[str, int] = {}
    sums: Sums = {}
    if placement.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier(group=placement.host_group)
    tensors = _summed(hf_tensors(chunks, architecture, placement), checksums)
    try:
        files = _write_files(tensors, partial, placement.rank)
        sums = {name: sum_of(partial / name) for name in sorted(set(files.values()))}
    except OSError as error:
        failure = f"{error.strerror or error}"
        for _ in tensors:  # other ranks are still sending their slices
            pass
    written: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(written, (files, sums, checksums, failure), group=placement.host_group)
    failure = next((text for *_, text in written if text), None)
    if placement.is_main and failure is None:
        weight_map = {name: file for part, *_ in written for name, file in part.items()}
        failure = _finish_directory(
            partial, directory, weight_map, companions_of, [own for _, own, *_ in written]
        )
    failure = placement.share_from_main(failure)
    if failure is not None:
        if placement.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise RapoError(
            f"model cannot be written to {directory}: {failure}; free space or choose another place"
        )
    return {name: value for *_, part, _ in written for name, value in part.items()}


def _summed(tensors: Iterator[tuple[str, Tensor]], checksums: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, while their checksums are taken."""
    for name, tensor in tensors:
        checksums[name] = tensor_checksum(tensor)
        yield name, tensor


def _write_files(tensors: Iterator[tuple[str, Tensor]], directory: Path, rank: int) -> dict[str, str]:
    """Saves tensors in files of at most FILE_BYTES; returns which tensor went into which file."""
    files: dict[str, str] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if not pending:
            return
        directory.mkdir(parents=True, exist_ok=True)
        file = f"model-rank{rank:05d}-{len(set(files.values())):05d}.safetensors"
        save_tensors(pending, directory / file)
        files.update(dict.fromkeys(pending, file))
        pending.clear()

    for name, tensor in tensors:
        if sum(t.nbytes for t in pending.values()) + tensor.nbytes > FILE_BYTES:
            flush()
        pending[name] = tensor
    flush()
    return files


def _finish_directory(
    partial: Path,
    directory: Path,
    weight_map: dict[str, str],
    companions_of: Path,
    sums: Sequence[Sums],
) -> str | None:
    """Adds index, companion files and checksums, and moves the directory into place; returns what failed."""
    try:
        write_companions(partial, companions_of, weight_map)
        write_sums(partial, sums)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    except OSError as error:
        return f"{error.strerror or error}"
    return None
