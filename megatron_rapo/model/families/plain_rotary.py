"""Rotary positions in plain PyTorch, for certificates (`plain.py`).

Angles are fp32, as HF and Megatron have them, and made by the same operations: in fp64 an angle's last bit
would be seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rapo.model.rope import Linear, Llama3, Rope, Yarn


def rotated(heads: Tensor, rope: Rope) -> Tensor:
    """Queries or keys `[tokens, heads, dim]` of one sequence, turned by their positions."""
    channels = int(heads.size(-1) * rope.share)
    turning, still = heads[..., :channels], heads[..., channels:]
    positions = torch.arange(len(heads), dtype=torch.float32)
    angles = torch.outer(positions, _frequencies(rope, channels))[:, None]
    cosine, sine = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    if isinstance(rope.scaling, Yarn):
        turning = turning * rope.scaling.attention_factor
    if rope.interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, -1)
    turned = first * cosine - second * sine, second * cosine + first * sine
    if rope.interleaved:
        return torch.cat((torch.stack(turned, -1).flatten(-2), still), -1)
    return torch.cat((*turned, still), -1)


def _frequencies(rope: Rope, channels: int) -> Tensor:
    powers = rope.theta ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)
    match rope.scaling:
        case None:
            return 1.0 / powers
        case Linear(factor):
            return 1.0 / powers / factor
        case Llama3():
            return torch.stack([_llama3(rope.scaling, one) for one in 1.0 / powers])
        case Yarn():
            return _yarn(rope.scaling, powers, rope.theta, channels)


def _llama3(its: Llama3, frequency: Tensor) -> Tensor:
    wave = 2 * math.pi / frequency
    if wave < its.positions / its.high:
        return frequency
    if wave > its.positions / its.low:
        return frequency / its.factor
    share = (its.positions / wave - its.low) / (its.high - its.low)
    return (1 - share) * frequency / its.factor + share * frequency


def _yarn(its: Yarn, powers: Tensor, theta: float, channels: int) -> Tensor:
    ends = [
        channels * math.log(its.positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (its.fast, its.slow)
    ]
    if its.truncate:
        ends = [float(math.floor(ends[0])), float(math.ceil(ends[1]))]
    first, last = max(ends[0], 0), min(ends[1], channels - 1)
    width = (last - first) or 0.001
    kept = 1 - ((torch.arange(channels // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return 1.0 / (its.factor * powers) * (1 - kept) + 1.0 / powers * kept
