"""Qwen2 and Qwen2.5: biases on query, key and value, of which their configurations say nothing."""

from __future__ import annotations

from functools import partial

from megatron_rapo.model.families import dense
from megatron_rapo.model.families.family import Family

QWEN2 = Family(
    "qwen2",
    refused=partial(dense.refused, windows=True),
    read=partial(dense.read, attention_bias=True, windows=True),
)
