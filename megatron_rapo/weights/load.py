"""A HF model or a Megatron checkpoint into this rank's shards, one tensor at a time.

Of safetensors, only the slices that the rank needs are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.weights.adapter_files import open_checkpoint
from megatron_rapo.weights.hf_check import check_tensors
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.megatron_files import is_checkpoint
from megatron_rapo.weights.parameter_map import MappedParameter, mapped_parameters


class WholeTensors(Protocol):
    """A model's tensors under their HF names."""

    directory: Path

    def shape(self, name: str) -> list[int]:
        """Shape of the whole tensor."""

    def read(self, name: str, dimension: int | None, start: int, stop: int) -> Tensor:
        """`name`, or its part `start:stop` of `dimension`."""


@contextmanager
def open_tensors(path: Path, architecture: Architecture) -> Iterator[WholeTensors]:
    """The tensors of a HF model directory or of a Megatron checkpoint, whichever `path` is.

    Raises:
        RapoError: files are missing or damaged, or of another architecture.
    """
    if is_checkpoint(path):
        yield open_checkpoint(path, architecture)
    else:
        with HFTensors(path) as tensors:
            check_tensors(tensors, architecture)
            yield tensors


def load_weights(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    directory: Path,
    tensor_rank: int,
    expert_tensor_rank: int = 0,
) -> None:
    """Fills every parameter of this rank's chunks from a HF model directory or a Megatron checkpoint.

    Of each matrix it is the slice of `tensor_rank`, of an expert's that of `expert_tensor_rank`.
    Padded vocabulary rows become zero. A rank holds no more than one tensor's slices beside its parameters.

    Raises:
        RapoError: weights are missing, damaged, or of another shape than the architecture's.
    """
    with open_tensors(directory, architecture) as tensors:
        for mapped in mapped_parameters(chunks, architecture):
            fill(mapped, tensors, architecture, tensor_rank, expert_tensor_rank)


@torch.no_grad()
def fill(
    mapped: MappedParameter,
    tensors: WholeTensors,
    architecture: Architecture,
    tensor_rank: int,
    expert_tensor_rank: int = 0,
) -> None:
    """Fills one parameter with its slices of whole tensors, those of this rank among all that share them.

    Raises:
        RapoError: a tensor is of another shape than the architecture's.
    """
    rank = tensor_rank if mapped.rule.expert is None else expert_tensor_rank
    parts = [_local_part(tensors, mapped, architecture, i, rank) for i in range(len(mapped.rule.hf))]
    mapped.parameter.copy_(mapped.rule.fusion.fuse(parts, architecture))


def _local_part(
    tensors: WholeTensors, mapped: MappedParameter, architecture: Architecture, index: int, rank: int
) -> Tensor:
    rule = mapped.rule
    name, local = list(rule.hf)[index], rule.fusion.split(mapped.parameter, architecture)[index]
    whole = tensors.shape(name)
    cut = rule.cut
    size = local.size(cut or 0)
    start = size * rank  # of a tensor that is cut; others are read whole
    total = whole[cut or 0]
    if rule.sections > 1:
        return _of_sections(tensors, name, local, rule.sections, rank)
    part = tensors.read(name, cut, min(start, total), min(start + size, total))
    missing = size - part.size(cut or 0)
    expected = list(local.shape)
    if missing and rule.vocabulary:
        part = torch.cat((part, part.new_zeros(missing, *part.shape[1:])))
    if list(part.shape) != expected or (rule.vocabulary and total != architecture.vocabulary):
        raise RapoError(
            f"tensor {name} in {tensors.directory} has shape {whole}, which does not fit config.json; "
            "is config.json that of its weights?"
        )
    return part


def _of_sections(tensors: WholeTensors, name: str, local: Tensor, sections: int, rank: int) -> Tensor:
    """A rank's rows of each section, one under the other. Whoever opened the tensors has checked shapes."""
    size, step = local.size(0) // sections, tensors.shape(name)[0] // sections
    starts = [section * step + rank * size for section in range(sections)]
    return torch.cat([tensors.read(name, 0, start, start + size) for start in starts])
