"""OLMo 3: OLMo 2's layers, three of four with a window of attention.

Layers with a window have plain rotary positions: only the others' are stretched by YaRN (OLMo 3's report,
arXiv 2512.13961; SGLang likewise). Configurations tell the stretch for all layers, unless transformers 5.19
or newer has written them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import dense, ropes
from megatron_rapo.model.families.family import Family
from megatron_rapo.model.families.olmo2 import NORMS
from megatron_rapo.model.rope import Rope


def _read(config: Any) -> Architecture:
    own = ropes.read(config)
    told = (config.rope_parameters or {}).get(dense.SLIDING)
    local = ropes.read(config, dense.SLIDING) if told else Rope(own.theta)
    window = dense.read_window(config, None if local == own else local)
    return dense.read(config, query_key_norm="heads", norms=NORMS, window=window)


OLMO3 = Family("olmo3", refused=partial(dense.refused, windows=True), read=_read)
