"""Rotary positions (RoPE, arXiv 2104.09864) and the ways to stretch them over longer contexts.

Each frequency is computed with the operations of transformers' `modeling_rope_utils`, in their order and in
fp32: angles of far positions are large, and a frequency's last bit is seen in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def scaled(self, frequencies: Tensor, rope: Rope, channels: int) -> Tensor:
        """The frequencies `[channels / 2]` in place of the plain ones."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's: long waves are divided, short ones kept, those between interpolated.

    Attributes:
        factor: that long waves are divided by.
        low, high: `low_freq_factor` and `high_freq_factor`: the limits are `positions` divided by them.
        positions: `original_max_position_embeddings`.
    """

    factor: float
    low: float
    high: float
    positions: int

    def scaled(self, frequencies: Tensor, rope: Rope, channels: int) -> Tensor:
        """The frequencies `[channels / 2]` in place of the plain ones."""
        waves = 2 * math.pi / frequencies
        is_long, is_short = waves > self.positions / self.low, waves < self.positions / self.high
        scaled = torch.where(is_long, frequencies / self.factor, frequencies)
        smooth = (self.positions / waves - self.low) / (self.high - self.low)
        between = (1 - smooth) * scaled / self.factor + smooth * scaled
        return torch.where(~is_short & ~is_long, between, scaled)


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): fast channels are kept, slow ones divided, with a ramp between them.

    Attributes:
        factor: that slow channels are divided by.
        positions: `original_max_position_embeddings`.
        attention_factor: that queries' and keys' rotated channels are multiplied by.
        fast, slow: `beta_fast` and `beta_slow`: turns over `positions` at which the ramp begins and ends.
        truncate: whether the ramp's ends are whole channels.
    """

    factor: float
    positions: int
    attention_factor: float
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True

    def scaled(self, frequencies: Tensor, rope: Rope, channels: int) -> Tensor:
        """The frequencies `[channels / 2]` in place of the plain ones."""
        low, high = (self._channel(turns, rope.theta, channels) for turns in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, channels - 1)
        high += 0.001 if low == high else 0
        ramp = ((torch.arange(channels // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * rope.powers(channels)) * (1 - kept) + frequencies * kept

    def _channel(self, turns: float, theta: float, channels: int) -> float:
        """The channel that makes so many turns over `positions`."""
        return channels * math.log(self.positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer.

    Attributes:
        theta: base of the frequencies.
        share: of a head's channels, the first ones, that rotate (`partial_rotary_factor`).
        interleaved: whether neighbouring channels rotate together; else those half the rotated ones apart.
        scaling: None of plain ones.
    """

    theta: float
    share: float = 1.0
    interleaved: bool = False
    scaling: Linear | Llama3 | Yarn | None = None

    @property
    def attention_factor(self) -> float:
        """What rotated channels of queries and keys are multiplied by."""
        return self.scaling.attention_factor if isinstance(self.scaling, Yarn) else 1.0

    def rotated(self, head_dim: int) -> int:
        """How many channels of a head rotate."""
        return int(head_dim * self.share)

    def powers(self, channels: int) -> Tensor:
        """`[channels / 2]` fp32: θ^(2i / channels)."""
        return self.theta ** (torch.arange(0, channels, 2, dtype=torch.float32) / channels)

    def frequencies(self, head_dim: int) -> Tensor:
        """`[rotated channels / 2]` fp32, in radians a position."""
        channels = self.rotated(head_dim)
        plain = 1.0 / self.powers(channels)
        return plain if self.scaling is None else self.scaling.scaled(plain, self, channels)
