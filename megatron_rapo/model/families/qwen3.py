"""Qwen3's dense models: an RMSNorm on each head's queries and keys, of which configurations say nothing."""

from __future__ import annotations

from functools import partial

from megatron_rapo.model.families import dense
from megatron_rapo.model.families.family import Family

QWEN3 = Family(
    "qwen3",
    refused=partial(dense.refused, windows=True),
    read=partial(dense.read, query_key_norm="head", windows=True),
)
