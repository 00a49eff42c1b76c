"""A fault of transformers 5.0 to 5.18 in OLMo 3, mended.

OLMo 3's layers with a window have plain rotary positions, and the others stretched ones (arXiv 2512.13961);
these releases give the stretched ones to all (transformers' pull request 45945). From 5.19 on a configuration
tells them apart by kind of layer.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

SLIDING = "sliding_attention"


def mend(model: Any) -> Any:
    """The model, an OLMo 3's layers with a window given plain rotary positions; others are left alone."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "olmo3" or rope.get("rope_type", "default") == "default":
        return model
    plain = deepcopy(config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    angles = type(model.model.rotary_emb)(plain).to(model.device)

    def with_plain_positions(
        layer: torch.nn.Module, given: tuple[torch.Tensor, ...], options: dict[str, Any]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        return given, {**options, "position_embeddings": angles(given[0], options["position_ids"])}

    for layer, kind in zip(model.model.layers, config.layer_types, strict=True):
        if kind == SLIDING:
            layer.register_forward_pre_hook(with_plain_positions, with_kwargs=True)
    return model
