"""The model families that there are."""

from __future__ import annotations

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.family import Family
from megatron_rapo.model.families.gemma3 import GEMMA3
from megatron_rapo.model.families.glm import GLM, GLM4
from megatron_rapo.model.families.llama import LLAMA
from megatron_rapo.model.families.mistral import MISTRAL
from megatron_rapo.model.families.mixtral import MIXTRAL
from megatron_rapo.model.families.olmo2 import OLMO2
from megatron_rapo.model.families.olmo3 import OLMO3
from megatron_rapo.model.families.qwen2 import QWEN2
from megatron_rapo.model.families.qwen2_moe import QWEN2_MOE
from megatron_rapo.model.families.qwen3 import QWEN3
from megatron_rapo.model.families.qwen3_moe import QWEN3_MOE
from megatron_rapo.model.families.smollm3 import SMOLLM3

DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA3, OLMO2, OLMO3, GLM, GLM4)
MIXTURES = (QWEN2_MOE, QWEN3_MOE, MIXTRAL)

FAMILIES = {family.name: family for family in (*DENSE, *MIXTURES)}
"""By HF's `model_type`."""

LATENT = "whose attention is of latent queries and keys (MLA)"
REASONS = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "minicpm3": LATENT,
    "gemma2": "whose logits and scores are capped by a tanh",
    "gemma3": "which takes images; save its text model as gemma3_text",
    "gpt_oss": "whose attention has sinks",
}
"""Why some of the families that there are not cannot be had."""


def family_of(architecture: Architecture) -> Family:
    """The family that an architecture is of."""
    return FAMILIES[architecture.family]
