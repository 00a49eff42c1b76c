"""OLMo 2: norms after the sublayers alone, and one over all heads of the queries, and of the keys."""

from __future__ import annotations

from functools import partial

from megatron_rapo.model.families import dense
from megatron_rapo.model.families.family import Family
from megatron_rapo.model.features import Norms

NORMS = Norms(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)

OLMO2 = Family("olmo2", read=partial(dense.read, query_key_norm="heads", norms=NORMS))
