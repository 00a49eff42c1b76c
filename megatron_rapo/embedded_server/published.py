"""The tensors of a model under the names that its published checkpoints have for them.

transformers keeps the experts of a layer in two tensors; checkpoints, trainers and other engines name each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

# What stands for `mlp`, gate, up and down where a family's names are not Qwen's.
_NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
_QWEN = ("mlp", "gate_proj", "up_proj", "down_proj")


def published(tensors: Mapping[str, torch.Tensor], model_type: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor, and each expert's parts of the tensors that hold all experts of a layer.

    Args:
        tensors: by transformers' names.
        model_type: HF's.
    """
    mixture, gate, up, down = _NAMES.get(model_type, _QWEN)
    for name, values in tensors.items():
        inner, _, last = name.rpartition(".")
        named = inner.replace(".mlp.", f".{mixture}.") if model_type in _NAMES else inner
        if inner.endswith(".mlp.experts") and last == "gate_up_proj":
            for expert, both in enumerate(values.unbind()):
                for one, matrix in zip((gate, up), both.chunk(2), strict=True):
                    yield f"{named}.{expert}.{one}.weight", matrix
        elif inner.endswith(".mlp.experts") and last == "down_proj":
            for expert, matrix in enumerate(values.unbind()):
                yield f"{named}.{expert}.{down}.weight", matrix
        else:
            yield f"{named}.{last}" if named else last, values
