"""Attention for decoding, registered with HF under its own name."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DECODING_ATTENTION = "rapo_decoding"


def decoding_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """HF's SDPA attention, except that one token's query heads never repeat the keys and values they share.

    HF copies keys and values for each query head of a group as soon as there is a mask, which at one new
    token costs more than the attention itself. Here a group's query heads stand where queries stand.

    Args:
        query: `[rows, heads, tokens, head_dim]`.
        key, value: `[rows, key-value heads, cached tokens, head_dim]`.
        attention_mask: `[rows, 1, tokens, cached tokens]`, or None.

    Returns:
        `[rows, tokens, heads, head_dim]`, and None for the weights.
    """
    rows, heads, tokens, head_dim = query.shape
    if tokens > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], head_dim)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, head_dim), None


AttentionInterface.register(DECODING_ATTENTION, decoding_attention)
AttentionMaskInterface.register(DECODING_ATTENTION, sdpa_mask)
