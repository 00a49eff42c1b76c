"""Buckets: HF tensors laid one behind the other in one flat buffer, which travels as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rapo.weights.holders import Holders
from megatron_rapo.weights.tensor_table import HFTensor
from megatron_rapo.wire.bucket import TensorMetadata, lay_out, views


@dataclass(frozen=True)
class Bucket:
    """Whole tensors that the same ranks hold, without gaps: the layout of SGLang's flattened buckets."""

    tensors: tuple[HFTensor, ...]
    dtype: torch.dtype

    @property
    def holders(self) -> Holders:
        """The ranks that hold its tensors."""
        return self.tensors[0].holders

    @property
    def nbytes(self) -> int:
        """Bytes of the whole bucket."""
        return sum(tensor.elements for tensor in self.tensors) * self.dtype.itemsize

    @property
    def layout(self) -> list[TensorMetadata]:
        """Where each tensor lies."""
        names, shapes = zip(*((tensor.name, tensor.shape) for tensor in self.tensors), strict=True)
        return lay_out(names, [self.dtype] * len(names), shapes)

    def views(self, flat: Tensor) -> Iterator[tuple[HFTensor, Tensor]]:
        """Each tensor with its place in `flat` `[nbytes]` uint8."""
        for tensor, (_, view) in zip(self.tensors, views(flat, self.layout), strict=True):
            yield tensor, view


def make_buckets(tensors: Sequence[HFTensor], dtype: torch.dtype, limit: int) -> list[Bucket]:
    """Consecutive tensors of the same holders in buckets of at most `limit` bytes; larger ones go alone."""
    buckets: list[Bucket] = []
    pending: list[HFTensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.elements * dtype.itemsize
        if pending and (size + nbytes > limit or tensor.holders != pending[0].holders):
            buckets.append(Bucket(tuple(pending), dtype))
            pending, size = [], 0
        pending.append(tensor)
        size += nbytes
    if pending:
        buckets.append(Bucket(tuple(pending), dtype))
    return buckets
