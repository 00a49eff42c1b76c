"""GLM-4-9B (`glm`), and GLM-4-0414 and GLM-Z1 (`glm4`), which have norms after the sublayers as well.

The first half of each head rotates, in neighbouring pairs. Gate and up projections are one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import dense, plain
from megatron_rapo.model.families.family import Family
from megatron_rapo.model.features import Norms
from megatron_rapo.model.rules import COLUMNS, ROWS, Rule

SANDWICH = Norms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
GATE_UP_PROJ = "mlp.gate_up_proj.weight"


def _read(config: Any, norms: Norms) -> Architecture:
    return dense.read(config, attention_bias=config.attention_bias, interleaved=True, norms=norms)


def _layer(a: Architecture) -> Iterator[Rule]:
    yield from dense.attention(a)
    yield from dense.norms_of_mlp(a)
    # Gate's rows, then up's: each half is cut by itself.
    yield Rule("mlp.linear_fc1.weight", {GATE_UP_PROJ: (2 * a.feed_forward, a.hidden)}, ROWS, sections=2)
    yield Rule("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (a.hidden, a.feed_forward)}, COLUMNS)


def _family(name: str, norms: Norms) -> Family:
    return Family(
        name,
        refused=partial(dense.refused, off=("mlp_bias",), partial_rope=True),
        read=partial(_read, norms=norms),
        layer=_layer,
        plain=partial(plain.logits, feed_forward=plain.merged_mlp),
    )


GLM, GLM4 = _family("glm", Norms()), _family("glm4", SANDWICH)
