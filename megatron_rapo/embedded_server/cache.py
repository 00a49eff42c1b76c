"""A key-value cache that is written in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


def growing_cache(layers: int, room: int) -> Cache:
    """A cache for so many layers, with buffers for `room` tokens at first."""
    return Cache(layers=[GrowingLayer(room) for _ in range(layers)])


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, as views `[rows, heads, tokens, head_dim]` of buffers with room for more.

    `DynamicLayer` allocates and copies all of them for each token; here a token is written where it belongs,
    and the buffers double when they are full.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens; returns the keys and values of all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [_with_room(states, self._room) for states in (key_states, value_states)]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        while end > self._buffers[0].shape[-2]:
            self._buffers = [
                torch.cat([buffer, torch.empty_like(buffer)], dim=-2) for buffer in self._buffers
            ]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows of these indices, which may repeat."""
        self._buffers = [buffer.index_select(0, indices) for buffer in self._buffers]
        self._show(self.get_seq_length())

    def _show(self, tokens: int) -> None:
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self._buffers)


def _with_room(like: torch.Tensor, tokens: int) -> torch.Tensor:
    rows, heads, _, head_dim = like.shape
    return like.new_empty(rows, heads, tokens, head_dim)
