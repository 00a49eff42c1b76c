"""Rounds of sampling, begun and finished at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from megatron_rapo.ahead.batches import Source
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.running import Tries
from megatron_rapo.experience.course import Phase, Wanted
from megatron_rapo.experience.sharing import Shared


def collect(
    source: Source,
    prompts: Sequence[Prompt],
    *,
    weight_version: int,
    phase: Phase = lambda name: nullcontext(),
    tries: Sequence[Tries] | None = None,
    **options: Any,
) -> Shared:
    """What a source gives for the prompts."""
    begun = source.begin(Wanted(prompts, tries), weight_version=weight_version, **options)
    return begun.finish(phase, weight_version)
