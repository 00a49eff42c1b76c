"""Rotary positions in HF configurations: what is refused, read and written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_rapo.model.rope import Linear, Llama3, Rope, Yarn

# Why a way to stretch positions is refused.
_BY_LENGTH = ", whose frequencies change with a sequence's length,"
_REFUSED = {"dynamic": _BY_LENGTH, "longrope": _BY_LENGTH}
_TAKEN = ("default", "linear", "llama3", "yarn")


def parameters(config: Any, layers: str = "full_attention") -> Mapping[str, Any]:
    """`rope_parameters` of one kind of layers; of all where the configuration does not tell them apart."""
    whole = config.rope_parameters or {}
    return whole.get(layers) or whole


def refused(config: Any, layers: str = "full_attention", *, partial: bool = False) -> Iterator[str]:
    """What a configuration's rotary positions have that ours do not.

    Args:
        config: HF's.
        layers: the kind of layers.
        partial: whether the family's layers can rotate a part of each head.
    """
    rope = parameters(config, layers)
    kind = rope.get("rope_type")
    if kind not in _TAKEN:
        yield f"rope_type = {kind!r}{_REFUSED.get(str(kind), '')}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not partial:
        yield "partial rotary positions"
    if rope is not config.rope_parameters and rope.get("truncate", True) is not True:
        yield f"truncate = false of {layers}, which transformers ignores,"


def read(config: Any, layers: str = "full_attention", *, interleaved: bool = False) -> Rope:
    """Those of one kind of layers."""
    rope = parameters(config, layers)
    positions = config.max_position_embeddings
    return Rope(
        theta=float(rope["rope_theta"]),
        share=float(rope.get("partial_rotary_factor", 1.0)),
        interleaved=interleaved,
        scaling=_scaling(rope, positions),
    )


def _scaling(rope: Mapping[str, Any], positions: int) -> Linear | Llama3 | Yarn | None:
    kind = rope["rope_type"]
    if kind == "linear":
        return Linear(float(rope["factor"]))
    original = rope.get("original_max_position_embeddings") or positions
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return Llama3(float(rope["factor"]), low, high, original)
    if kind == "yarn":
        factor = float(rope.get("factor") or positions / original)
        return Yarn(
            factor=factor,
            positions=original,
            attention_factor=_attention_factor(rope, factor),
            fast=float(rope.get("beta_fast") or 32),
            slow=float(rope.get("beta_slow") or 1),
            truncate=bool(rope.get("truncate", True)),
        )
    return None


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """YaRN's, as given or as transformers derives it (arXiv 2309.00071, equation 22)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def magnitude(coefficient: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0

    own, of_all = rope.get("mscale"), rope.get("mscale_all_dim")
    return magnitude(own) / magnitude(of_all) if own and of_all else magnitude(1.0)


def written(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` that `read` makes the same of."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.share != 1.0:
        found["partial_rotary_factor"] = rope.share
    match rope.scaling:
        case Linear(factor):
            return found | {"rope_type": "linear", "factor": factor}
        case Llama3(factor, low, high, positions):
            factors = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            return found | factors | {"rope_type": "llama3", "original_max_position_embeddings": positions}
        case Yarn(factor, positions, attention_factor, fast, slow, truncate):
            return found | {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": positions,
                "attention_factor": attention_factor,
                "beta_fast": fast,
                "beta_slow": slow,
                "truncate": truncate,
            }
    return found
