"""Llama 2 and 3, and what is built as they are: Yi, DeepSeek-LLM, the distillations of R1 into Llama."""

from __future__ import annotations

from megatron_rapo.model.families.family import Family

LLAMA = Family("llama")
