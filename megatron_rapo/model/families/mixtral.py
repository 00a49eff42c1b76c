"""Mixtral 8x7B, 8x22B: Mistral's attention, and experts under names of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import dense, mixture, plain_mixture
from megatron_rapo.model.families.family import Family

NAMES = mixture.Names(
    router="block_sparse_moe.gate", experts="block_sparse_moe.experts", gate="w1", up="w3", down="w2"
)


def _read(config: Any) -> Architecture:
    dense_model = dense.read(config, windows=True)
    count = config.num_local_experts
    return mixture.read(config, dense_model, dense_model.feed_forward, count=count, renormalised=True)


MIXTRAL = Family(
    "mixtral",
    refused=mixture.refused,
    read=_read,
    written=mixture.written,
    layer=partial(mixture.layer, names=NAMES),
    transformer=mixture.transformer,
    plain=plain_mixture.logits(NAMES),
)
