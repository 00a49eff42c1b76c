"""Mistral 7B from v0.2 on, Mistral Nemo, Mistral Small 1 to 3: Llama's layers.

A window of attention (Mistral 7B v0.1) is refused unless it is as long as the model has positions.
"""

from __future__ import annotations

from megatron_rapo.model.families.family import Family

MISTRAL = Family("mistral")
