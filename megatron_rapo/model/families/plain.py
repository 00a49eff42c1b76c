"""A transformer in plain PyTorch, one sequence at a time, in any float type.

Certificates compare with it. It shares no code with the models that are certified. (HF's own models will
not do: their norms compute in fp32 whatever the weights' type.) Only the rotary angles are fp32, as HF and
Megatron both have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_rapo.model.architecture import Architecture

Weights = Mapping[str, Tensor]


def mlp(own: Weights, architecture: Architecture, x: Tensor) -> Tensor:
    """SwiGLU of `[tokens, hidden]`; `own` are a layer's weights."""
    gated = F.silu(x @ own["mlp.gate_proj.weight"].T) * (x @ own["mlp.up_proj.weight"].T)
    return gated @ own["mlp.down_proj.weight"].T


def logits(
    weights: Weights,
    architecture: Architecture,
    token_ids: Tensor,
    feed_forward: Callable[[Weights, Architecture, Tensor], Tensor] = mlp,
) -> Tensor:
    """`[tokens, vocabulary]` of one sequence `[tokens]`; `feed_forward` is a layer's second half."""
    a = architecture
    x = weights["model.embed_tokens.weight"][token_ids]
    for layer in range(a.layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        rotary = layer not in a.layers_without_rope
        x = x + _attention(own, a, _norm(x, own["input_layernorm.weight"], a), rotary)
        y = _norm(x, own["post_attention_layernorm.weight"], a)
        x = x + feed_forward(own, a, y)
    head = weights["model.embed_tokens.weight" if a.tied else "lm_head.weight"]
    return _norm(x, weights["model.norm.weight"], a) @ head.T


def _attention(own: Weights, a: Architecture, x: Tensor, rotary: bool) -> Tensor:
    tokens = len(x)

    def project(name: str, heads: int) -> Tensor:
        y = x @ own[f"self_attn.{name}.weight"].T
        if a.attention_bias:
            y = y + own[f"self_attn.{name}.bias"]
        return y.view(tokens, heads, a.head_dim)

    query, key = project("q_proj", a.heads), project("k_proj", a.kv_heads)
    value = project("v_proj", a.kv_heads)
    if a.query_key_norm:
        query = _norm(query, own["self_attn.q_norm.weight"], a)
        key = _norm(key, own["self_attn.k_norm.weight"], a)
    if rotary:
        cosine, sine = _rotary(a, tokens)
        query, key = (_rotate(y, cosine.to(x.dtype), sine.to(x.dtype)) for y in (query, key))
    shared = a.heads // a.kv_heads
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / a.head_dim**0.5
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    attended = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", attended, value).flatten(1) @ own["self_attn.o_proj.weight"].T


def _norm(x: Tensor, weight: Tensor, a: Architecture) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + a.norm_epsilon).rsqrt() * weight


def _rotary(a: Architecture, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, `[tokens, 1, head_dim]` fp32."""
    exponent = torch.arange(0, a.head_dim, 2, dtype=torch.float32) / a.head_dim
    angles = torch.outer(torch.arange(tokens, dtype=torch.float32), 1.0 / (a.rope_theta**exponent))
    angles = torch.cat((angles, angles), -1)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine
