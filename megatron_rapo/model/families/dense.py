"""What dense families have in common: RMSNorm, gated MLPs, rotary positions, grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import ropes
from megatron_rapo.model.features import Window
from megatron_rapo.model.rope import Rope
from megatron_rapo.model.rules import COLUMNS, EMBEDDING, GATE_UP, HEAD, QKV, ROWS, WHOLE, Rule

# Options that may be in a HF configuration, but not on: Megatron's layers have no counterpart. Where
# `attention_bias` is one, HF's layers put biases on the output projection as well.
OFF = ("attention_bias", "mlp_bias")
FULL, SLIDING = "full_attention", "sliding_attention"


def refused(
    config: Any,
    off: Sequence[str] = OFF,
    *,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    windows: bool = False,
    partial_rope: bool = False,
) -> Iterator[str]:
    """What a configuration has that layers as these do not.

    Args:
        config: HF's.
        off: options that must not be on.
        activation: the option that names the gate's, and what it must be.
        windows: whether the family's layers can have windows of attention.
        partial_rope: whether they can rotate a part of each head.
    """
    option, name = activation
    if (found := getattr(config, option)) != name:
        yield f"{option} = {found!r}"
    for option in off:
        if getattr(config, option, False):
            yield f"{option} = true"
    if others := set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}:
        yield f"layers of type {', '.join(sorted(map(str, others)))}"
    if not windows and (window := read_window(config)) is not None:
        positions = config.max_position_embeddings
        yield f"sliding_window = {window.size}, less than max_position_embeddings = {positions},"
    yield from ropes.refused(config, partial=partial_rope)


def read(
    config: Any,
    *,
    attention_bias: bool = False,
    query_key_norm: Literal["head", "heads"] | None = None,
    layers_without_rope: tuple[int, ...] = (),
    windows: bool = False,
    interleaved: bool = False,
    **features: Any,
) -> Architecture:
    """The architecture of a configuration; a family says what its configurations leave out.

    Args:
        config: HF's.
        attention_bias, query_key_norm, layers_without_rope: as `Architecture` has them.
        windows: whether layers have the window that the configuration tells.
        interleaved: as `Rope` has it.
        features: other fields of `Architecture`.
    """
    given: dict[str, Any] = {"rope": ropes.read(config, interleaved=interleaved)}
    if windows:
        given["window"] = read_window(config)
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
        max_positions=config.max_position_embeddings,
        attention_bias=attention_bias,
        query_key_norm=query_key_norm,
        tied=bool(config.tie_word_embeddings),
        layers_without_rope=layers_without_rope,
        **{**given, **features},
    )


def read_window(config: Any, rope: Rope | None = None) -> Window | None:
    """The window of a configuration's layers: of those that it calls sliding, of all where it names no kinds.

    One that holds all positions is none, unless its layers have rotary positions `rope` of their own.
    """
    size = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or [SLIDING] * config.num_hidden_layers
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == SLIDING)
    if not size or not layers or (size >= config.max_position_embeddings and rope is None):
        return None
    return Window(size, layers, rope)


def written(a: Architecture, **others: Any) -> dict[str, Any]:
    """The options of a HF configuration that `read` makes the same architecture of; `others` are more."""
    window: dict[str, Any] = {}
    if a.window is not None:
        kinds = [SLIDING if layer in a.window.layers else FULL for layer in range(a.layers)]
        window = {"sliding_window": a.window.size, "use_sliding_window": True, "layer_types": kinds}
    return {
        "num_hidden_layers": a.layers,
        "hidden_size": a.hidden,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": a.feed_forward,
        "vocab_size": a.vocabulary,
        "rms_norm_eps": a.norm_epsilon,
        "rope_parameters": ropes.written(a.rope),
        "max_position_embeddings": a.max_positions,
        "tie_word_embeddings": a.tied,
        # Families that have biases have them unless told.
        **({} if a.attention_bias else {"attention_bias": False}),
        **window,
        **others,
    }


def layer(a: Architecture) -> Iterator[Rule]:
    """The parameters of a layer."""
    yield from attention(a)
    yield from norms_of_mlp(a)
    gated = {f"mlp.{name}_proj.weight": (a.feed_forward, a.hidden) for name in ("gate", "up")}
    yield Rule("mlp.linear_fc1.weight", gated, ROWS, GATE_UP)
    yield Rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (a.hidden, a.feed_forward)}, COLUMNS)


def norms_of_mlp(a: Architecture) -> Iterator[Rule]:
    """Those before and after a layer's MLP."""
    if (before := a.norms.before_mlp) is not None:
        fused = "mlp.linear_fc1.layer_norm_weight"
        yield Rule(
            "pre_mlp_layernorm.weight", {f"{before}.weight": (a.hidden,)}, WHOLE, transformer_engine=fused
        )
    if (after := a.norms.after_mlp) is not None:
        yield Rule("mlp_bda.norm.weight", {f"{after}.weight": (a.hidden,)}, WHOLE)


def attention(a: Architecture) -> Iterator[Rule]:
    """The parameters of a layer's attention, and of the norms before and after it."""
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    projections = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
    if (before := a.norms.before_attention) is not None:
        fused = "self_attention.linear_qkv.layer_norm_weight"
        yield Rule(
            "input_layernorm.weight", {f"{before}.weight": (a.hidden,)}, WHOLE, transformer_engine=fused
        )
    weights = {f"{name}.weight": (rows, a.hidden) for name, rows in projections.items()}
    yield Rule("self_attention.linear_qkv.weight", weights, ROWS, QKV, heads=True)
    if a.attention_bias:
        biases = {f"{name}.bias": (rows,) for name, rows in projections.items()}
        yield Rule("self_attention.linear_qkv.bias", biases, ROWS, QKV, heads=True)
    if a.query_key_norm == "head":
        for name in ("q", "k"):
            norm = {f"self_attn.{name}_norm.weight": (a.head_dim,)}
            yield Rule(f"self_attention.{name}_layernorm.weight", norm, WHOLE)
    elif a.query_key_norm == "heads":
        for name, hf, rows in (("query", "q", query), ("key", "k", key)):
            norm = {f"self_attn.{hf}_norm.weight": (rows,)}
            yield Rule(f"self_attention.{name}_norm.weight", norm, ROWS, whole_in_engines=True)
    yield Rule("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (a.hidden, query)}, COLUMNS)
    if (after := a.norms.after_attention) is not None:
        yield Rule("self_attn_bda.norm.weight", {f"{after}.weight": (a.hidden,)}, WHOLE)


def ends(a: Architecture) -> Iterator[Rule]:
    """The parameters before the first layer, and after the last one."""
    rows = (a.vocabulary, a.hidden)
    yield Rule("embedding.word_embeddings.weight", {EMBEDDING: rows}, ROWS, vocabulary=True)
    yield Rule("decoder.final_layernorm.weight", {"model.norm.weight": (a.hidden,)}, WHOLE)
    # Where the head is the embedding, a last stage that is not the first has a copy of it.
    head = EMBEDDING if a.tied else HEAD
    yield Rule("output_layer.weight", {head: rows}, ROWS, vocabulary=True, copy=a.tied)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh (arXiv 1606.08415)."""
    return F.gelu(x, approximate="tanh")


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
        "layernorm_zero_centered_gamma": a.norms.zero_centred,
        "gated_linear_unit": True,
        "activation_func": {"silu": F.silu, "gelu_tanh": gelu_tanh}[a.activation],
        "add_bias_linear": False,
        "add_qkv_bias": a.attention_bias,
        "qk_layernorm": a.query_key_norm == "head",
        "rotary_interleaved": a.rope.interleaved,
        "softmax_scale": a.attention_scale,
        # Tokens before the own one, and after it.
        "window_size": None if a.window is None else (a.window.size - 1, 0),
        "window_attn_skip_freq": None
        if a.window is None
        else [int(layer in a.window.layers) for layer in range(a.layers)],
    }
