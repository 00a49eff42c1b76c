"""What a transformer layer is made of: Transformer Engine's modules on GPUs, Megatron's own elsewhere."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rapo.model.attention import PackedAttention, RMSNorm
from megatron_rapo.model.branches import branching
from megatron_rapo.model.router import Router


def uses_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: there is CUDA, and it is installed."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def block_spec(config: TransformerConfig, vp_stage: int | None) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of one model chunk."""
    experts, grouped = config.num_moe_experts, config.moe_grouped_gemm
    if uses_transformer_engine():
        layer = get_gpt_layer_with_transformer_engine_spec(experts, grouped, qk_layernorm=config.qk_layernorm)
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = branching(attention.core_attention)
        if experts:
            _of_mixture(layer.submodules.mlp).router = Router
        return layer
    layer = get_gpt_layer_local_spec(
        experts, grouped, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    modules = layer.submodules
    if experts:
        _of_mixture(modules.mlp).router = Router
        # No linear of Transformer Engine's takes the norm before a router in, so it keeps its name.
        del modules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
    attention = modules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def _of_mixture(mlp: Any) -> Any:
    """What an MoE layer is made of; from megatron-core 0.19 on a function makes it."""
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
