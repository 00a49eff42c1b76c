"""Packed segments that attend to more than themselves: sequences that share what they begin with.

Before core attention the keys and values of each segment are gathered: those of the segments before it on its
path, then its own. So queries and keys have lengths of their own, and the mask is causal from the bottom
right: a segment's last query sees all of its keys. That is the form of flash attention's and Transformer
Engine's kernels for packed sequences. The backward of the gathering sums what segments give to a shared one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rapo.model.routing_replay import Packed, Routing

# A rectangle may be larger than what is in it by this, so that few rectangles have all segments.
_MOST_PADDING = 1.25


def starts_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """`[len(lengths) + 1]` int32: where each begins, and the end."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


@dataclass
class Branches(Packed):
    """What Megatron hands on to core attention.

    Its `cu_seqlens_q` and `cu_seqlens_kv` are of segments and of their gathered keys. The padded ones are
    what the rotary embedding reads: one stretch of all rows, of which each has an angle of its own.

    Attributes:
        keys: int64 `[Σ key_lengths]`, rows.
        query_lengths, key_lengths: of each segment.
    """

    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    query_lengths: Sequence[int] = ()
    key_lengths: Sequence[int] = ()

    @classmethod
    def of(
        cls,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
        keys: Tensor,
        routing: Routing | None = None,
    ) -> Branches:
        """Of segments whose rows follow each other."""
        rows = starts_of([sum(query_lengths)], keys.device)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=starts_of(query_lengths, keys.device),
            cu_seqlens_kv=starts_of(key_lengths, keys.device),
            cu_seqlens_q_padded=rows,
            cu_seqlens_kv_padded=rows,
            max_seqlen_q=max(query_lengths),
            max_seqlen_kv=max(key_lengths),
            routing=routing,
            keys=keys,
            query_lengths=query_lengths,
            key_lengths=key_lengths,
        )

    @cached_property
    def rectangles(self) -> list[_Rectangle]:
        """All segments, those of about the same lengths together; made once for all layers."""
        return [_Rectangle.of(numbers, self) for numbers in _alike(self.query_lengths, self.key_lengths)]

    @cached_property
    def places(self) -> Tensor:
        """Where each row is among those of all rectangles."""
        return torch.cat([one.rows for one in self.rectangles]).argsort()


@dataclass(frozen=True)
class _Rectangle:
    """Segments of about the same lengths, padded to one.

    Attributes:
        queries, keys: `[segments, longest]` rows; that of padding is any.
        last: `[segments, longest query]`: of its segment's keys the one at a query's own place, the last that
            it sees.
        is_square: whether nothing is padded and the keys are the queries' own.
        valid: `[segments, longest query]` bool: what is no padding.
        rows: those of the valid queries.
    """

    queries: Tensor
    keys: Tensor
    last: Tensor
    is_square: bool
    valid: Tensor
    rows: Tensor
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, numbers: Sequence[int], branches: Branches) -> _Rectangle:
        device = branches.keys.device

        def rectangle(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            column = torch.arange(int(lengths.max()), device=device)
            valid = column < lengths[:, None]
            return torch.where(valid, starts[:, None] + column, starts[:, None]), valid

        def chosen(values: Tensor) -> Tensor:
            return values.long()[torch.tensor(numbers, device=device)]

        query_lengths, key_lengths = (
            chosen(starts.diff()) for starts in (branches.cu_seqlens_q, branches.cu_seqlens_kv)
        )
        queries, valid = rectangle(chosen(branches.cu_seqlens_q), query_lengths)
        keys, _ = rectangle(chosen(branches.cu_seqlens_kv), key_lengths)
        row = torch.arange(queries.size(1), device=device)
        # Of a query of padding too, so that each has a key.
        last = (key_lengths - query_lengths)[:, None] + row.minimum(query_lengths[:, None] - 1)
        is_square = bool(valid.all()) and queries.size(1) == keys.size(1)
        return cls(queries, branches.keys[keys], last, is_square, valid, queries[valid])

    def mask(self, window: int | None) -> Tensor | None:
        """`[segments, 1, longest query, longest key]` bool, made once for all layers that have the window.

        None: causal, and nothing is padded.
        """
        if window not in self.masks:
            column = torch.arange(self.keys.size(1), device=self.keys.device)
            last = self.last[:, :, None]
            seen = column <= last if window is None else (column <= last) & (column > last - window)
            self.masks[window] = None if self.is_square and window is None else seen[:, None]
        return self.masks[window]


def _alike(query_lengths: Sequence[int], key_lengths: Sequence[int]) -> Iterator[list[int]]:
    """Segments in groups that waste little when they are padded."""
    pairs = list(zip(query_lengths, key_lengths, strict=True))
    group: list[int] = []
    longest, area = 0, 0
    for number in sorted(range(len(pairs)), key=lambda n: pairs[n], reverse=True):
        queries, keys = pairs[number]
        padded = (len(group) + 1) * pairs[(group or [number])[0]][0] * max(longest, keys)
        if group and padded > _MOST_PADDING * (area + queries * keys):
            yield group
            group, longest, area = [], 0, 0
        group.append(number)
        longest, area = max(longest, keys), area + queries * keys
    yield group


def gathered(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]`; the backward sums the gradients of a row's copies."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    branches: Branches,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Core attention by torch's kernel, on any device.

    Args:
        query: `[rows, heads, dim]`.
        key, value: `[rows, kv_heads, dim]`.
        branches: what attends to what.
        scale: of the scores.
        window: how many of the last keys each query sees; None: all.

    Returns:
        `[rows, heads × dim]`.
    """
    key_value = torch.cat((key, value), dim=-1)
    found = []
    for one in branches.rectangles:
        keys, values = gathered(key_value, one.keys).transpose(1, 2).split(key.size(-1), dim=-1)
        mask = one.mask(window)
        attended = F.scaled_dot_product_attention(
            gathered(query, one.queries).transpose(1, 2),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        found.append(attended.transpose(1, 2)[one.valid])
    return torch.cat(found).index_select(0, branches.places).flatten(1)


# Megatron has no such value, and hands on the name alone.
BOTTOM_RIGHT = SimpleNamespace(name="padding_causal_bottom_right")


def branching(core_attention: type) -> type:
    """Megatron's wrapper of Transformer Engine's attention, which then takes branches too.

    Args:
        core_attention: `TEDotProductAttention`, or what has its `forward`.
    """

    class BranchingAttention(core_attention):
        """Gathers keys and values, and masks from the bottom right."""

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            attn_mask_type: Any = None,
            attention_bias: Tensor | None = None,
            packed_seq_params: PackedSeqParams | None = None,
            **options: Any,
        ) -> Tensor:
            """As Megatron's: `[rows, heads, dim]` to `[rows, heads × dim]`."""
            if isinstance(packed_seq_params, Branches):
                key, value = (gathered(each, packed_seq_params.keys) for each in (key, value))
                attn_mask_type = BOTTOM_RIGHT
                packed_seq_params = PackedSeqParams(
                    qkv_format="thd",
                    cu_seqlens_q=packed_seq_params.cu_seqlens_q,
                    cu_seqlens_kv=packed_seq_params.cu_seqlens_kv,
                    max_seqlen_q=packed_seq_params.max_seqlen_q,
                    max_seqlen_kv=packed_seq_params.max_seqlen_kv,
                )
            return super().forward(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=attn_mask_type,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
                **options,
            )

    return BranchingAttention
