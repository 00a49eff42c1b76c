"""Rotary positions in Megatron's layers, which may differ in them, and norms over all heads."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.norms import HeadsNorm
from megatron_rapo.model.rope import Rope
from megatron_rapo.parallel.device import device


def ropes_of(architecture: Architecture) -> list[Rope]:
    """The model's own, and that of its layers with a window where it is another."""
    window = architecture.window
    return [architecture.rope, *([window.rope] if window is not None and window.rope is not None else [])]


def rope_of_layer(architecture: Architecture, layer: int) -> int | None:
    """Which of `ropes_of` a layer has, counted from 0; None of one without rotary positions."""
    if layer in architecture.layers_without_rope:
        return None
    window = architecture.window
    return int(window is not None and window.rope is not None and layer in window.layers)


class Angles(torch.nn.Module):
    """In place of Megatron's `RotaryEmbedding`, with what a `GPTModel` asks of it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        ropes = ropes_of(architecture)
        self.interleaved = architecture.rope.interleaved
        self.frequencies = torch.stack([rope.frequencies(architecture.head_dim) for rope in ropes])
        self._made = torch.empty(len(ropes), 0)

    def get_rotary_seq_len(self, *given: Any) -> int:
        """How many positions the packed sequences of a microbatch have; they come last of what is given."""
        packed: PackedSeqParams = given[-1]
        return max(packed.max_seqlen_q, packed.max_seqlen_kv)

    def forward(self, positions: int, **_: Any) -> Tensor:
        """`[ropes, positions, 1, 1, rotated channels]` fp32 angles."""
        if self._made.size(1) < positions:
            self._made = self._make(positions)
        return self._made[:, :positions]

    def _make(self, positions: int) -> Tensor:
        place = device()
        counted = torch.arange(positions, device=place, dtype=torch.float32)
        angles = counted[:, None] * self.frequencies.to(place)[:, None]
        pairs = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat((angles, angles), -1)
        return pairs[:, :, None, None]


class Attention(SelfAttention):
    """Megatron's, whose layers may have different rotary positions, or a norm over all heads.

    Queries and keys are multiplied by YaRN's attention factor before they are rotated, which is linear.
    """

    def __init__(self, *given: Any, architecture: Architecture, **options: Any) -> None:
        super().__init__(*given, **options)
        self._rope = rope_of_layer(architecture, self.layer_number - 1)
        rope = None if self._rope is None else ropes_of(architecture)[self._rope]
        self._factor = 1.0 if rope is None else rope.attention_factor
        self._rotated = architecture.rope.rotated(architecture.head_dim)
        self.query_norm = self.key_norm = None
        if architecture.query_key_norm == "heads":
            self.query_norm = HeadsNorm(self.config, architecture.heads)
            self.key_norm = HeadsNorm(self.config, architecture.kv_heads)

    def forward(
        self, *given: Any, rotary_pos_emb: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; `rotary_pos_emb` are the angles of all ropes, and may be none of theirs."""
        if rotary_pos_emb is not None:
            rotary_pos_emb = None if self._rope is None else rotary_pos_emb[self._rope]
        return super().forward(*given, rotary_pos_emb=rotary_pos_emb, **options)

    def get_query_key_value_tensors(self, *given: Any, **options: Any) -> tuple[Tensor, ...]:
        """`[tokens, 1, heads, dim]` each, not yet rotated."""
        query, key, *rest = super().get_query_key_value_tensors(*given, **options)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return self._scaled(query), self._scaled(key), *rest

    def _scaled(self, heads: Tensor) -> Tensor:
        if self._factor == 1.0:
            return heads
        if self._rotated == heads.size(-1):
            return heads * self._factor
        rotated, others = heads.split([self._rotated, heads.size(-1) - self._rotated], dim=-1)
        return torch.cat((rotated * self._factor, others), -1)
