"""Gemma 3's text models (270M, 1B).

Norms before and after each sublayer, which multiply by 1 + weight; in five of six layers a window, and rotary
positions of their own; GELU in the gate; scaled embeddings. Larger ones take images: their text model is
saved apart as `gemma3_text`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families import dense, ropes
from megatron_rapo.model.families.family import Family
from megatron_rapo.model.features import Norms

NORMS = Norms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    zero_centred=True,
)


def _refused(config: Any) -> Iterator[str]:
    for option in ("final_logit_softcapping", "attn_logit_softcapping"):
        if (cap := getattr(config, option)) is not None:
            yield f"{option} = {cap}"
    if config.use_bidirectional_attention:
        yield "use_bidirectional_attention = true"
    yield from dense.refused(config, activation=("hidden_activation", "gelu_pytorch_tanh"), windows=True)
    yield from ropes.refused(config, dense.SLIDING)


def _read(config: Any) -> Architecture:
    return dense.read(
        config,
        query_key_norm="head",
        norms=NORMS,
        window=dense.read_window(config, ropes.read(config, dense.SLIDING)),
        activation="gelu_tanh",
        embedding_scale=config.hidden_size**0.5,
        attention_scale=config.query_pre_attn_scalar**-0.5,
    )


def _written(a: Architecture) -> dict[str, Any]:
    assert a.attention_scale is not None and a.window is not None and a.window.rope is not None
    kinds = {dense.FULL: ropes.written(a.rope), dense.SLIDING: ropes.written(a.window.rope)}
    return dense.written(a, rope_parameters=kinds, query_pre_attn_scalar=round(a.attention_scale**-2))


GEMMA3 = Family("gemma3_text", refused=_refused, read=_read, written=_written)
