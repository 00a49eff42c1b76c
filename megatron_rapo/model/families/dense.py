"""What dense families have in common: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.rules import COLUMNS, EMBEDDING, GATE_UP, HEAD, QKV, ROWS, WHOLE, Rule

# Options that may be in a HF configuration, but not on: Megatron's layers have no counterpart. Where
# `attention_bias` is one, HF's layers put biases on the output projection as well.
OFF = ("use_sliding_window", "attention_bias", "mlp_bias")

# Llama 3's frequency scaling, as Megatron's rotary embedding hard-codes it; only the factor is free.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def refused(config: Any, off: Sequence[str] = OFF) -> Iterator[str]:
    """What a configuration has that layers as these do not; `off` are options that must not be on."""
    if config.hidden_act != "silu":
        yield f"hidden_act = {config.hidden_act!r}"
    for option in off:
        if getattr(config, option, False):
            yield f"{option} = true"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        positions = config.max_position_embeddings
        yield f"sliding_window = {window}, less than max_position_embeddings = {positions},"
    rope = config.rope_parameters or {}
    if rope.get("rope_type") not in ("default", "llama3"):
        yield f"rope_type = {rope.get('rope_type')!r}"
    elif rope["rope_type"] == "llama3" and any(float(rope[key]) != at for key, at in LLAMA3_ROPE.items()):
        yield f"rope scaling other than {LLAMA3_ROPE}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial rotary positions"


def read(
    config: Any,
    *,
    attention_bias: bool = False,
    query_key_norm: bool = False,
    layers_without_rope: tuple[int, ...] = (),
) -> Architecture:
    """The architecture of a configuration; a family says what its configurations leave out."""
    rope = config.rope_parameters
    return Architecture(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_factor=float(rope["factor"]) if rope["rope_type"] == "llama3" else None,
        max_positions=config.max_position_embeddings,
        attention_bias=attention_bias,
        query_key_norm=query_key_norm,
        tied=bool(config.tie_word_embeddings),
        layers_without_rope=layers_without_rope,
    )


def layer(a: Architecture) -> Iterator[Rule]:
    """The parameters of a layer."""
    yield from attention(a)
    yield Rule(
        "pre_mlp_layernorm.weight",
        {"post_attention_layernorm.weight": (a.hidden,)},
        WHOLE,
        transformer_engine="mlp.linear_fc1.layer_norm_weight",
    )
    gated = {f"mlp.{name}_proj.weight": (a.feed_forward, a.hidden) for name in ("gate", "up")}
    yield Rule("mlp.linear_fc1.weight", gated, ROWS, GATE_UP)
    yield Rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (a.hidden, a.feed_forward)}, COLUMNS)


def attention(a: Architecture) -> Iterator[Rule]:
    """The parameters of a layer's attention, and of the norm before it."""
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    projections = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
    yield Rule(
        "input_layernorm.weight",
        {"input_layernorm.weight": (a.hidden,)},
        WHOLE,
        transformer_engine="self_attention.linear_qkv.layer_norm_weight",
    )
    weights = {f"{name}.weight": (rows, a.hidden) for name, rows in projections.items()}
    yield Rule("self_attention.linear_qkv.weight", weights, ROWS, QKV, heads=True)
    if a.attention_bias:
        biases = {f"{name}.bias": (rows,) for name, rows in projections.items()}
        yield Rule("self_attention.linear_qkv.bias", biases, ROWS, QKV, heads=True)
    if a.query_key_norm:
        for name in ("q", "k"):
            norm = {f"self_attn.{name}_norm.weight": (a.head_dim,)}
            yield Rule(f"self_attention.{name}_layernorm.weight", norm, WHOLE)
    yield Rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (a.hidden, query)}, COLUMNS)


def ends(a: Architecture) -> Iterator[Rule]:
    """The parameters before the first layer, and after the last one."""
    rows = (a.vocabulary, a.hidden)
    yield Rule("embedding.word_embeddings.weight", {EMBEDDING: rows}, ROWS, vocabulary=True)
    yield Rule("decoder.final_layernorm.weight", {"model.norm.weight": (a.hidden,)}, WHOLE)
    # Where the head is the embedding, a last stage that is not the first has a copy of it.
    head = EMBEDDING if a.tied else HEAD
    yield Rule("output_layer.weight", {head: rows}, ROWS, vocabulary=True, copy=a.tied)


def transformer(a: Architecture) -> Mapping[str, Any]:
    """The fields of Megatron's `TransformerConfig` that say what a layer computes."""
    return {
        "num_layers": a.layers,
        "hidden_size": a.hidden,
        "ffn_hidden_size": a.feed_forward,
        "num_attention_heads": a.heads,
        "num_query_groups": a.kv_heads,
        "kv_channels": a.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": a.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": a.attention_bias,
        "qk_layernorm": a.query_key_norm,
        "no_rope_freq": [int(layer in a.layers_without_rope) for layer in range(a.layers)]
        if a.layers_without_rope
        else None,
    }
