"""What a transformer layer is made of: Transformer Engine's modules on GPUs, Megatron's own elsewhere."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.attention import PackedAttention
from megatron_rapo.model.branches import branching
from megatron_rapo.model.norms import RMSNorm, normed_addition
from megatron_rapo.model.rotary import Attention
from megatron_rapo.model.router import Router


def uses_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: there is CUDA, and it is installed."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def block_spec(
    architecture: Architecture, config: TransformerConfig, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of one model chunk."""
    if uses_transformer_engine():
        return _with_transformer_engine(architecture, config)
    layer = get_gpt_layer_local_spec(
        config.num_moe_experts,
        config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    modules = layer.submodules
    if config.num_moe_experts:
        # No linear of Transformer Engine's takes the norm before a router in, so it keeps its name.
        del modules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm if architecture.norms.before else IdentityOp
    attention = modules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    _as_the_family_has_it(layer, architecture, config, RMSNorm)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def _with_transformer_engine(architecture: Architecture, config: TransformerConfig) -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer = get_gpt_layer_with_transformer_engine_spec(
        config.num_moe_experts, config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
    attention = layer.submodules.self_attention.submodules
    if config.window_size is not None and config.context_parallel_size > 1:
        # Transformer Engine's exchange of keys around a ring knows no windows.
        attention.core_attention = PackedAttention
    else:
        attention.core_attention = branching(attention.core_attention)
    if not architecture.norms.before:  # its linears take the norm in
        attention.linear_qkv = TEColumnParallelLinear
        _inside(layer.submodules.mlp).linear_fc1 = TEColumnParallelLinear
    _as_the_family_has_it(layer, architecture, config, TENorm)
    return layer


def _as_the_family_has_it(
    layer: ModuleSpec, architecture: Architecture, config: TransformerConfig, norm: type
) -> None:
    modules = layer.submodules
    modules.self_attention.module = Attention
    modules.self_attention.params = {**modules.self_attention.params, "architecture": architecture}
    if architecture.norms.after:
        modules.self_attn_bda = modules.mlp_bda = normed_addition(config, norm)
    if config.num_moe_experts:
        _inside(modules.mlp).router = Router


def _inside(mlp: Any) -> Any:
    """What an MLP or an MoE layer is made of; from megatron-core 0.19 on a function makes it."""
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
