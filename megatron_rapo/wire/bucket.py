"""SGLang's flattened bucket: several tensors as one run of bytes, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rapo.errors import RapoError


@dataclass(frozen=True)
class TensorMetadata:
    """Where a tensor lies in a bucket; the fields are those of SGLang's `FlattenedTensorMetadata`.

    Attributes:
        start_idx: its first byte.
        end_idx: the byte past its last.
        numel: its number of bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


def lay_out(
    names: Sequence[str], dtypes: Sequence[torch.dtype], shapes: Sequence[Sequence[int]]
) -> list[TensorMetadata]:
    """Where each tensor lies when they follow each other in this order."""
    layout, start = [], 0
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        size = math.prod(shape) * dtype.itemsize
        layout.append(TensorMetadata(name, tuple(shape), dtype, start, start + size, size))
        start += size
    return layout


def views(flat: torch.Tensor, layout: Sequence[TensorMetadata]) -> list[tuple[str, torch.Tensor]]:
    """The bucket's tensors, as views of its bytes.

    Args:
        flat: `[bytes]` uint8.

    Raises:
        RapoError: a tensor does not lie where its metadata say.
    """
    named = []
    for tensor in layout:
        try:
            part = flat[tensor.start_idx : tensor.end_idx].view(tensor.dtype).view(tensor.shape)
        except RuntimeError as error:
            raise RapoError(
                f"{tensor.name} {list(tensor.shape)} {tensor.dtype} does not fit bytes {tensor.start_idx} to "
                f"{tensor.end_idx} of a bucket of {flat.numel()}: {error}"
            ) from error
        named.append((tensor.name, part))
    return named
