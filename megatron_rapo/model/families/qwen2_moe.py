"""Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B: biases as Qwen2 has them, and a gated expert that every token passes."""

from __future__ import annotations

from typing import Any

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import dense, mixture, plain_mixture
from megatron_rapo.model.families.family import Family


def _read(config: Any) -> Architecture:
    return mixture.read(
        config,
        dense.read(config, attention_bias=config.qkv_bias, windows=True),
        config.moe_intermediate_size,
        count=config.num_experts,
        renormalised=config.norm_topk_prob,
        shared=config.shared_expert_intermediate_size,
    )


QWEN2_MOE = Family(
    "qwen2_moe",
    refused=mixture.refused,
    read=_read,
    written=mixture.written,
    layer=mixture.layer,
    transformer=mixture.transformer,
    plain=plain_mixture.logits(),
)
