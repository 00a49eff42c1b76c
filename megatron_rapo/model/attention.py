"""Core attention on any device, where Transformer Engine's is not to be had.

Megatron's own `DotProductAttention` refuses packed sequences and context parallelism.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_rapo.model.branches import Branches, attend
from megatron_rapo.parallel.context import gather_tokens, rank_major_order


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence, over zig-zag context-parallel shards.

    Sequences are padded to a rectangle for torch's scaled_dot_product_attention: the work grows with the
    longest sequence of a microbatch, the memory with sequences × longest. Some layers see a window alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            assert config.window_size is not None
            self.window = config.window_size[0] + 1
        self.group = parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attends `query` `[tokens/CP, heads, dim]` to `key`, `value` `[tokens/CP, kv_heads, dim]`.

        Returns:
            `[tokens/CP, heads × dim]`.
        """
        assert packed_seq_params is not None, "sequences are always packed (thd)"
        if isinstance(packed_seq_params, Branches):
            return attend(query, key, value, packed_seq_params, self.scale, self.window)
        ranks = self.group.size()
        starts = packed_seq_params.cu_seqlens_q.long()
        lengths = starts.diff()
        order = rank_major_order(lengths.tolist(), ranks).to(query.device)
        key_value = gather_tokens(torch.cat((key, value), dim=-1), order, self.group)

        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths)
        position = torch.arange(len(sequence), device=query.device) - starts[sequence]
        mine = order[self.group.rank()]
        row = sequence[mine]
        column = torch.arange(len(mine), device=query.device) - starts[row] // ranks

        longest = int(lengths.max())
        queries = _rectangle(query, row, column, len(lengths), longest // ranks)
        keys, values = _rectangle(key_value, sequence, position, len(lengths), longest).split(
            key.size(-1), dim=-1
        )
        # Padding queries stand at position 0, so that each row of the mask allows at least one key.
        query_position = position.new_zeros(len(lengths), longest // ranks)
        query_position[row, column] = position[mine]
        before = query_position[:, None, :, None] - torch.arange(longest, device=query.device)
        seen = before >= 0 if self.window is None else (before >= 0) & (before < self.window)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, scale=self.scale, enable_gqa=True
        )
        return attended.transpose(1, 2)[row, column].flatten(1)


def _rectangle(packed: Tensor, row: Tensor, column: Tensor, rows: int, columns: int) -> Tensor:
    """Scatters `packed` `[tokens, heads, dim]` into zeros `[rows, heads, columns, dim]`."""
    padded = packed.new_zeros(rows, columns, *packed.shape[1:])
    return padded.index_put((row, column), packed).transpose(1, 2)
