"""What layers with a window of attention see of the cached tokens."""

from __future__ import annotations

from typing import Any

import torch

FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = frozenset({FULL, SLIDING})


def window_of(config: Any) -> int | None:
    """How many tokens, the newest among them, such layers of a HF model see; None where it has none."""
    # Of a class without the option transformers ignores it.
    if not hasattr(type(config), "sliding_window") or not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None)
    return (config.sliding_window or None) if kinds is None or SLIDING in kinds else None


def masks(config: Any, mask: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask of one new token a row, in the form that the model takes: of each kind of layers, or of all.

    Args:
        config: the model's.
        mask: `[rows, 1, 1, cached tokens]`, added to attention scores; the last is the new token's.
    """
    window = window_of(config)
    if window is None:
        return mask
    near = mask.clone()
    near[..., :-window] = -torch.inf
    return near if getattr(config, "layer_types", None) is None else {FULL: mask, SLIDING: near}
