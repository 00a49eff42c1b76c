"""Lets tokens go to their experts over gloo, which takes lists of integers for sizes, and parts of one size.

The dispatcher of megatron-core tells sizes in arrays (token_dispatcher.py), and under expert tensor
parallelism it gathers and scatters as many rows of a rank as it has (tensor_parallel/mappings.py), as NCCL
lets it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

VERSIONS = ">=0.16.1,<0.20"


def repair() -> None:
    """Does nothing where there is CUDA."""
    if torch.cuda.is_available():
        return
    distributed: Any = dist
    distributed.all_to_all_single = with_integer_sizes(dist.all_to_all_single)
    distributed.all_gather = with_uneven_parts(dist.all_gather)
    distributed.reduce_scatter = scattered_by_all_reduce


def with_integer_sizes(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """`all_to_all_single`, given the sizes of parts in any sequence."""

    def exchanged(
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[Any] | None = None,
        input_split_sizes: Sequence[Any] | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        sizes = [
            None if sizes is None else [int(size) for size in sizes]
            for sizes in (output_split_sizes, input_split_sizes)
        ]
        return exchange(output, input, *sizes, *args, **options)

    return exchanged


def with_uneven_parts(gather: Callable[..., Any]) -> Callable[..., Any]:
    """`all_gather` of parts that may differ in their number of rows."""

    def gathered(tensor_list: list[Tensor], tensor: Tensor, *args: Any, **options: Any) -> Any:
        rows = [part.shape[0] if part.dim() else 1 for part in tensor_list]
        if len(set(rows)) == 1:
            return gather(tensor_list, tensor, *args, **options)
        padded = [part.new_zeros(max(rows), *part.shape[1:]) for part in (tensor, *tensor_list)]
        padded[0][: len(tensor)] = tensor
        gather(padded[1:], padded[0], *args, **options)
        for part, found in zip(tensor_list, padded[1:], strict=True):
            part.copy_(found[: len(part)])
        return None

    return gathered


def scattered_by_all_reduce(
    output: Tensor, input_list: list[Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """`reduce_scatter` of a sum, whose parts may differ in their number of rows."""
    whole = torch.cat(input_list)
    dist.all_reduce(whole, group=group)
    output.copy_(whole.split([len(part) for part in input_list])[dist.get_rank(group)])
