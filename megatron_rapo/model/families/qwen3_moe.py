"""Qwen3's mixtures of experts: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder."""

from __future__ import annotations

from typing import Any

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import dense, mixture, plain_mixture
from megatron_rapo.model.families.family import Family


def _read(config: Any) -> Architecture:
    return mixture.read(
        config,
        dense.read(config, query_key_norm="head", windows=True),
        config.moe_intermediate_size,
        count=config.num_experts,
        renormalised=config.norm_topk_prob,
    )


QWEN3_MOE = Family(
    "qwen3_moe",
    refused=mixture.refused,
    read=_read,
    written=mixture.written,
    layer=mixture.layer,
    transformer=mixture.transformer,
    plain=plain_mixture.logits(),
)
