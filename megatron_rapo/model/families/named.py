"""The model families that there are."""

from __future__ import annotations

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.family import Family
from megatron_rapo.model.families.llama import LLAMA
from megatron_rapo.model.families.mistral import MISTRAL
from megatron_rapo.model.families.mixtral import MIXTRAL
from megatron_rapo.model.families.qwen2 import QWEN2
from megatron_rapo.model.families.qwen2_moe import QWEN2_MOE
from megatron_rapo.model.families.qwen3 import QWEN3
from megatron_rapo.model.families.qwen3_moe import QWEN3_MOE
from megatron_rapo.model.families.smollm3 import SMOLLM3

DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3)
MIXTURES = (QWEN2_MOE, QWEN3_MOE, MIXTRAL)

FAMILIES = {family.name: family for family in (*DENSE, *MIXTURES)}
"""By HF's `model_type`."""


def family_of(architecture: Architecture) -> Family:
    """The family that an architecture is of."""
    return FAMILIES[architecture.family]
