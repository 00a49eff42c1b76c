"""Which implementation computes rows: Triton's on a GPU, PyTorch's elsewhere and in fp64."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_rapo.loss import rows
from megatron_rapo.loss.rows import GradientTerms, MixtureSums, Pull, RowSums


def row_sums(logits: Tensor, temperature: float, pull: Pull | None) -> RowSums:
    """`rows.row_sums`, by whichever implementation suits `logits`."""
    if _by_triton(logits):
        from megatron_rapo.loss import triton_rows

        return triton_rows.row_sums(logits, temperature, pull)
    return rows.row_sums(logits, temperature, pull)


def mixture_sums(logits: Tensor, temperature: float, pull: Pull, sums: RowSums) -> MixtureSums:
    """`rows.mixture_sums`, by whichever implementation suits `logits`."""
    if _by_triton(logits):
        from megatron_rapo.loss import triton_rows

        return triton_rows.mixture_sums(logits, temperature, pull, sums)
    return rows.mixture_sums(logits, temperature, pull, sums)


def write_gradient(logits: Tensor, temperature: float, pull: Pull | None, terms: GradientTerms) -> None:
    """`rows.write_gradient`, by whichever implementation suits `logits`."""
    if _by_triton(logits):
        from megatron_rapo.loss import triton_rows

        triton_rows.write_gradient(logits, temperature, pull, terms)
    else:
        rows.write_gradient(logits, temperature, pull, terms)


def _by_triton(logits: Tensor) -> bool:
    return logits.is_cuda and logits.dtype is not torch.float64 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
