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
from megatron_rapo.model.families.plain_rotary import rotated

Weights = Mapping[str, Tensor]


def mlp(own: Weights, architecture: Architecture, x: Tensor) -> Tensor:
    """The gated MLP of `[tokens, hidden]`; `own` are a layer's weights."""
    gate, up = x @ own["mlp.gate_proj.weight"].T, x @ own["mlp.up_proj.weight"].T
    return _activated(gate, architecture) * up @ own["mlp.down_proj.weight"].T


def merged_mlp(own: Weights, architecture: Architecture, x: Tensor) -> Tensor:
    """The same where gate and up are one tensor."""
    gate, up = (x @ own["mlp.gate_up_proj.weight"].T).chunk(2, -1)
    return _activated(gate, architecture) * up @ own["mlp.down_proj.weight"].T


def _activated(gate: Tensor, a: Architecture) -> Tensor:
    return F.silu(gate) if a.activation == "silu" else F.gelu(gate, approximate="tanh")


def logits(
    weights: Weights,
    architecture: Architecture,
    token_ids: Tensor,
    feed_forward: Callable[[Weights, Architecture, Tensor], Tensor] = mlp,
) -> Tensor:
    """`[tokens, vocabulary]` of one sequence `[tokens]`; `feed_forward` is a layer's second half."""
    a = architecture
    x = weights["model.embed_tokens.weight"][token_ids]
    if a.embedding_scale is not None:
        x = x * torch.tensor(a.embedding_scale, dtype=torch.float32).to(x.dtype)
    for layer in range(a.layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        y = _attention(own, a, _named_norm(x, own, a.norms.before_attention, a), layer)
        x = x + _named_norm(y, own, a.norms.after_attention, a)
        y = feed_forward(own, a, _named_norm(x, own, a.norms.before_mlp, a))
        x = x + _named_norm(y, own, a.norms.after_mlp, a)
    head = weights["model.embed_tokens.weight" if a.tied else "lm_head.weight"]
    return _norm(x, weights["model.norm.weight"], a) @ head.T


def _attention(own: Weights, a: Architecture, x: Tensor, layer: int) -> Tensor:
    tokens = len(x)

    def project(name: str, heads: int) -> Tensor:
        y = x @ own[f"self_attn.{name}_proj.weight"].T
        if a.attention_bias:
            y = y + own[f"self_attn.{name}_proj.bias"]
        if name != "v" and a.query_key_norm == "heads":
            y = _norm(y, own[f"self_attn.{name}_norm.weight"], a)
        y = y.view(tokens, heads, a.head_dim)
        if name != "v" and a.query_key_norm == "head":
            y = _norm(y, own[f"self_attn.{name}_norm.weight"], a)
        return y

    query, key, value = project("q", a.heads), project("k", a.kv_heads), project("v", a.kv_heads)
    window = a.window if a.window is not None and layer in a.window.layers else None
    if layer not in a.layers_without_rope:
        rope = a.rope if window is None or window.rope is None else window.rope
        query, key = rotated(query, rope), rotated(key, rope)
    shared = a.heads // a.kv_heads
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scale = a.head_dim**-0.5 if a.attention_scale is None else a.attention_scale
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    if window is not None:
        hidden = hidden | torch.ones(tokens, tokens, dtype=torch.bool).tril(-window.size)
    attended = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", attended, value).flatten(1) @ own["self_attn.o_proj.weight"].T


def _named_norm(x: Tensor, own: Weights, name: str | None, a: Architecture) -> Tensor:
    return x if name is None else _norm(x, own[f"{name}.weight"], a)


def _norm(x: Tensor, weight: Tensor, a: Architecture) -> Tensor:
    factor = 1 + weight if a.norms.zero_centred else weight
    return x * (x.square().mean(-1, keepdim=True) + a.norm_epsilon).rsqrt() * factor
