"""The checksum of weights against its definition in plain integers, and the mistakes that it must show."""

from __future__ import annotations

import struct

import pytest
import torch

from megatron_rapo.checksum import WORDS, tensor_checksum


def by_definition(data: bytes) -> int:
    """The docstring's formula, word by word."""
    data += b"\0" * (-len(data) % 8)
    total = 0
    for i, (word,) in enumerate(struct.iter_unpack("<Q", data)):
        block, place = divmod(i, WORDS)
        total += (2 * block + 1) * word * ((2 * place + 1) * 0x9E3779B97F4A7C15)
    return total % (1 << 64)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (WORDS,), (7, 19_001)])
def test_it_is_what_the_definition_says(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert tensor_checksum(tensor) == by_definition(raw(tensor))


def test_every_mistake_shows() -> None:
    tensor = torch.randn(300, 1000, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    changed = tensor.clone()
    changed.view(torch.int16)[299, 999] ^= 1
    swapped = tensor[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    sums = [tensor_checksum(t) for t in (tensor, changed, swapped, tensor.t(), tensor.float(), tensor[:-1])]
    assert len(set(sums)) == len(sums)


def test_a_view_counts_as_what_it_shows() -> None:
    tensor = torch.arange(24.0).view(4, 6)
    assert tensor_checksum(tensor[:, 1:3]) == tensor_checksum(tensor[:, 1:3].clone())
