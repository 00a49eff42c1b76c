"""SmolLM3: Llama's layers, some of which, every fourth as published, have no rotary positions."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import dense
from megatron_rapo.model.families.family import Family


def _read(config: Any) -> Architecture:
    rope = config.no_rope_layers  # 1 where a layer has it
    without = tuple(layer for layer in range(config.num_hidden_layers) if not rope[layer])
    return dense.read(config, layers_without_rope=without, windows=True)


def _written(a: Architecture) -> dict[str, Any]:
    rope = [int(layer not in a.layers_without_rope) for layer in range(a.layers)]
    return dense.written(a, no_rope_layers=rope)


SMOLLM3 = Family("smollm3", refused=partial(dense.refused, windows=True), read=_read, written=_written)
