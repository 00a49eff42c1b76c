"""A device's own rates: matrix products and attention by size, memory; and the disk's."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from megatron_rapo.calibration.timing import fastest
from megatron_rapo.planning.profile import Rate

MIB = 1 << 20
# Rows and columns of the first, columns of the second: from what a call takes to more than a cache holds.
_PRODUCTS = {
    "cpu": (
        (8, 32, 32),
        (32, 64, 128),
        (64, 192, 192),
        (256, 192, 768),
        (1024, 256, 1024),
        (1024, 768, 3072),
    ),
    "cuda": (
        (64, 1024, 1024),
        (512, 2048, 2048),
        (2048, 4096, 4096),
        (8192, 4096, 8192),
        (8192, 8192, 28672),
    ),
}
_LENGTHS = {"cpu": (16, 64, 256, 1024), "cuda": (256, 1024, 4096, 16384)}
_HEADS = {"cpu": (6, 32), "cuda": (16, 128)}  # and their size


def matrix_rates(where: torch.device, dtype: torch.dtype) -> list[Rate]:
    """Of products of two matrices."""
    rates = []
    for rows, inner, columns in _PRODUCTS[where.type]:
        left = torch.randn(rows, inner, device=where, dtype=dtype)
        right = torch.randn(columns, inner, device=where, dtype=dtype)
        flops = 2.0 * rows * inner * columns
        seconds = fastest(partial(linear, left, right))
        rates.append(Rate(flops=flops, flops_per_s=flops / seconds))
    return rates


def attention_rates(where: torch.device, dtype: torch.dtype) -> list[Rate]:
    """Of causal attention, counted without causality's discount."""
    heads, size = _HEADS[where.type]
    rates = []
    for length in _LENGTHS[where.type]:
        one = torch.randn(1, heads, length, size, device=where, dtype=dtype)
        flops = 4.0 * heads * size * length * length
        seconds = fastest(partial(scaled_dot_product_attention, one, one, one, is_causal=True))
        rates.append(Rate(flops=flops, flops_per_s=flops / seconds))
    return rates


def memory_bytes_per_s(where: torch.device) -> float:
    """Of a copy that no cache holds: read and written."""
    source = torch.zeros(64 * MIB if where.type == "cpu" else 1024 * MIB, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    return 2 * source.numel() / fastest(lambda: target.copy_(source))


def disk_bytes_per_s(folder: Path) -> float:
    """Of a file that is written to the disk, and read (which the cache may answer)."""
    file = folder / "disk"
    content = os.urandom(32 * MIB)

    def write_and_read() -> None:
        with file.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        file.read_bytes()

    return 2 * len(content) / fastest(write_and_read)
