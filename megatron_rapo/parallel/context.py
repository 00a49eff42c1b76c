"""How context parallelism splits packed sequences: zig-zag halves, so that causal work is balanced.

Each sequence is cut into 2·CP equal chunks; rank r holds chunks r and 2·CP − 1 − r. This is the split that
Transformer Engine and Megatron's rotary embedding assume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_major_order(lengths: Sequence[int], ranks: int) -> Tensor:
    """Positions of the packed tokens, listed rank by rank.

    Args:
        lengths: padded length of each packed sequence, each a multiple of 2·ranks (of 1 for one rank).
        ranks: size of the context-parallel group.

    Returns:
        `[ranks, tokens / ranks]` int64: row r holds the packed positions of rank r's tokens.
    """
    if ranks == 1:
        return torch.arange(sum(lengths)).view(1, -1)
    rows: list[list[Tensor]] = [[] for _ in range(ranks)]
    start = 0
    for length in lengths:
        chunks = torch.arange(start, start + length).view(2 * ranks, -1)
        for rank, row in enumerate(rows):
            row += [chunks[rank], chunks[2 * ranks - 1 - rank]]
        start += length
    return torch.stack([torch.cat(row) for row in rows])


class _GatherTokens(torch.autograd.Function):
    """All-gather along dimension 0; the backward sums and scatters the gradient."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None


def gather_tokens(local: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The packed tokens of all ranks, in packed order.

    Args:
        local: `[tokens / ranks, ...]`, this rank's tokens.
        order: `[ranks, tokens / ranks]` from `rank_major_order`.
        group: the context-parallel group.

    Returns:
        `[tokens, ...]`; its backward sums the gradient over the group.
    """
    if group.size() == 1:
        return local
    return _GatherTokens.apply(local, group).index_select(0, torch.argsort(order.flatten()))
