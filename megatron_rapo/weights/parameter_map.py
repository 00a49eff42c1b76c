"""HF ↔ Megatron parameters, as a table.

Every HF tensor is cut over tensor parallelism into equal contiguous slices of one dimension (or not at all),
and a Megatron parameter is one, or a fusion of several, such slices. So loading reads slices and fuses them,
exporting splits and concatenates, and a resharding plan needs nothing but this table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.layer_spec import uses_transformer_engine


@dataclass(frozen=True)
class Fusion:
    """How the local slices of several HF tensors become one Megatron parameter, and back."""

    fuse: Callable[[Sequence[Tensor], Architecture], Tensor]
    split: Callable[[Tensor, Architecture], Sequence[Tensor]]


def _fuse_qkv(parts: Sequence[Tensor], architecture: Architecture) -> Tensor:
    """Query, key, value rows interleaved by key-value group: [q… k v] [q… k v] …"""
    groups = parts[1].size(0) // architecture.head_dim
    grouped = [part.view(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(fused: Tensor, architecture: Architecture) -> Sequence[Tensor]:
    dim, per_group = architecture.head_dim, architecture.heads // architecture.kv_heads
    grouped = fused.view(-1, (per_group + 2) * dim, *fused.shape[1:])
    return [part.flatten(0, 1) for part in grouped.split([per_group * dim, dim, dim], dim=1)]


ONE = Fusion(lambda parts, _: parts[0], lambda whole, _: [whole])
GATE_UP = Fusion(lambda parts, _: torch.cat(tuple(parts)), lambda fused, _: fused.chunk(2))
QKV = Fusion(_fuse_qkv, _split_qkv)

ROWS, COLUMNS, WHOLE = 0, 1, None  # the dimension of the HF tensor that tensor parallelism cuts


@dataclass(frozen=True)
class Rule:
    """A line of the table: a Megatron parameter, and how the HF tensors it is made of are cut and fused."""

    megatron: str
    hf: tuple[str, ...]
    cut: int | None
    fusion: Fusion = ONE
    transformer_engine: str | None = None  # its name where Transformer Engine fuses the norm into the linear


# fmt: off
LAYER = [
    Rule("input_layernorm.weight", ("input_layernorm.weight",), WHOLE,
         transformer_engine="self_attention.linear_qkv.layer_norm_weight"),
    Rule("self_attention.linear_qkv.weight",
         ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), ROWS, QKV),
    Rule("self_attention.linear_qkv.bias",
         ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), ROWS, QKV),
    Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), WHOLE),
    Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), WHOLE),
    Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), COLUMNS),
    Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), WHOLE,
         transformer_engine="mlp.linear_fc1.layer_norm_weight"),
    Rule("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), ROWS, GATE_UP),
    Rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), COLUMNS),
]
ENDS = [
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ROWS),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), WHOLE),
    Rule("output_layer.weight", ("lm_head.weight",), ROWS),
]
# The last stage's copy of a tied embedding: loaded like it, never exported.
TIED_HEAD = Rule("output_layer.weight", ("model.embed_tokens.weight",), ROWS)
# fmt: on


@dataclass(frozen=True)
class MappedParameter:
    """A parameter of this rank with its rule, the HF names filled in."""

    parameter: torch.nn.Parameter
    hf: tuple[str, ...]
    cut: int | None
    fusion: Fusion
    exported: bool


def mapped_parameters(chunks: Sequence[GPTModel], architecture: Architecture) -> Iterator[MappedParameter]:
    """Every parameter of this rank's chunks with the HF tensors that it holds slices of.

    Raises:
        RapoError: a parameter that the table does not know.
    """
    layer_rules = {_local_name(rule): rule for rule in LAYER}
    end_rules = {rule.megatron: rule for rule in ENDS}
    if architecture.tied:
        end_rules[TIED_HEAD.megatron] = TIED_HEAD
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, index, inner = name.split(".", 3)
                # layer_number counts from 1 over the whole model; the index only within this chunk.
                prefix = f"model.layers.{chunk.decoder.layers[int(index)].layer_number - 1}."
                rule = layer_rules.get(inner)
            else:
                prefix, rule = "", end_rules.get(name)
            if rule is None:
                raise RapoError(f"parameter {name} has no counterpart in HF models of {architecture.family}")
            hf = tuple(prefix + tensor for tensor in rule.hf)
            yield MappedParameter(parameter, hf, rule.cut, rule.fusion, exported=rule is not TIED_HEAD)


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of the whole model, as Megatron checkpoints store it.

    Attributes:
        key: its name there. All layers share one: the checkpoint stacks them.
        layer: its place in the stack, or None for the model's ends.
        shape: of this layer's part, vocabulary rows unpadded.
        hf: the HF tensors that it is a fusion of, with their shapes.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    hf: dict[str, tuple[int, ...]]
    fusion: Fusion


def stored_parameters(architecture: Architecture) -> Iterator[StoredParameter]:
    """Every parameter of the whole model, layer after layer: what a checkpoint of it holds."""
    shapes = hf_shapes(architecture)
    embedding, *last = [(None, rule) for rule in ENDS if rule.hf[0] in shapes]
    layers = [(layer, rule) for layer in range(architecture.layers) for rule in LAYER if rule.hf[0] in shapes]
    for layer, rule in [embedding, *layers, *last]:
        # Checkpoints know Transformer Engine's names whatever the layers were made of.
        name = rule.transformer_engine or rule.megatron
        rows = sum(shapes[tensor][0] for tensor in rule.hf)
        prefix = "" if layer is None else f"model.layers.{layer}."
        yield StoredParameter(
            key=name if layer is None else f"decoder.layers.{name}",
            layer=layer,
            shape=(rows, *shapes[rule.hf[0]][1:]),
            hf={prefix + tensor: shapes[tensor] for tensor in rule.hf},
            fusion=rule.fusion,
        )


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of the HF tensors that the architecture has, by the names of the table."""
    hidden, feed_forward, dim = architecture.hidden, architecture.feed_forward, architecture.head_dim
    query, key_value = architecture.heads * dim, architecture.kv_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (feed_forward, hidden),
        "mlp.up_proj.weight": (feed_forward, hidden),
        "mlp.down_proj.weight": (hidden, feed_forward),
        "model.embed_tokens.weight": (architecture.vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not architecture.tied:
        shapes["lm_head.weight"] = (architecture.vocabulary, hidden)
    if architecture.attention_bias:
        for name, rows in (("q", query), ("k", key_value), ("v", key_value)):
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
    if architecture.query_key_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (dim,)
    return shapes


def _local_name(rule: Rule) -> str:
    return rule.transformer_engine if rule.transformer_engine and uses_transformer_engine() else rule.megatron
