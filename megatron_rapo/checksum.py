"""The checksum of a tensor's bytes, as trainer and engines compute it, at the speed of memory."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WORDS = 1 << 13  # of a block: its factors stay in a core's cache
_MIX = 0x9E3779B97F4A7C15  # odd, so that every word counts with all its bits
_MODULUS = 1 << 64
_SLAB = 512  # blocks at once on a GPU


def tensor_checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of the tensor's values as they lie in memory, row by row; no part of it is the shape.

    Σ_b (2b + 1) · Σ_i w[b, i] · f[i] modulo 2⁶⁴ over blocks b of 2¹³ words w of eight bytes (the last filled
    up with zeros), with fixed odd factors f: a changed bit, words that changed places, and blocks that did,
    all show. It guards against mistakes, not against someone who forges weights.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = len(data) // (8 * WORDS) * (8 * WORDS)
    total = _sum_of_blocks(data[:whole].view(torch.int64).view(-1, WORDS), first=0)
    if whole < len(data):
        rest = torch.zeros(8 * WORDS, dtype=torch.uint8, device=data.device)
        rest[: len(data) - whole] = data[whole:]
        total += _sum_of_blocks(rest.view(torch.int64).view(1, WORDS), first=whole // (8 * WORDS))
    return total % _MODULUS


def _sum_of_blocks(blocks: Tensor, first: int) -> int:
    """`blocks` `[n, WORDS]` int64, whose products wrap modulo 2⁶⁴ as C's unsigned ones do."""
    factors = _factors(blocks.device)
    if blocks.is_cuda:  # which has no matrix product of integers
        sums = torch.cat([(slab * factors).sum(1) for slab in blocks.split(_SLAB)])
    else:
        sums = torch.mv(blocks, factors)
    return sum((2 * (first + b) + 1) * value for b, value in enumerate(sums.tolist()))


@cache
def _factors(device: torch.device) -> Tensor:
    """`[WORDS]` fixed odd factors: an arithmetic progression, scattered by a multiplication."""
    values = [((2 * i + 1) * _MIX) % _MODULUS for i in range(WORDS)]
    signed = [value - _MODULUS if value >= _MODULUS // 2 else value for value in values]
    return torch.tensor(signed, dtype=torch.int64, device=device)
