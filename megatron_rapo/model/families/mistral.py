"""Mistral 7B, Mistral Nemo, Mistral Small 1 to 3: Llama's layers, in 7B v0.1 with a window of attention."""

from __future__ import annotations

from functools import partial

from megatron_rapo.model.families import dense
from megatron_rapo.model.families.family import Family

MISTRAL = Family(
    "mistral", refused=partial(dense.refused, windows=True), read=partial(dense.read, windows=True)
)
