"""Adapters that are certified: random A and B, and what they make of a model in plain PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_rapo.config import Adapter
from megatron_rapo.model.adapter_rules import A, B
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import model_rules

_SUFFIX = ".weight"


class RandomAdapters:
    """Matrices of which none is 0, so that A has a gradient, and a policy without them is another model."""

    directory = Path("[adapter]")  # what errors would name; there is no file

    def __init__(self, architecture: Architecture, adapter: Adapter) -> None:
        self._shapes = {
            name: shape for _, rule in model_rules(architecture, adapter) for name, shape in rule.hf.items()
        }

    def all(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Each by its HF name."""
        return {name: self.read(name, None, 0, 0).to(dtype) for name in self._shapes}

    def shape(self, name: str) -> list[int]:
        """Shape of the whole matrix."""
        return list(self._shapes[name])

    def read(self, name: str, dimension: int | None, start: int, stop: int) -> Tensor:
        """The matrix `name` in fp64, or its part `start:stop` of `dimension`; its values are fp32's."""
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
        random = torch.Generator().manual_seed(seed)
        whole = (torch.randn(self._shapes[name], generator=random) * 0.1).double()
        return whole if dimension is None else whole.narrow(dimension, start, stop - start)


def adapted(weights: Mapping[str, Tensor], matrices: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights with W + scale · B · A in place of each W that has them; differentiable in A and B."""
    found = dict(weights)
    for name in weights:
        of_a, of_b = (f"{name.removesuffix(_SUFFIX)}.{which}{_SUFFIX}" for which in (A, B))
        if of_a in matrices:
            found[name] = weights[name] + scale * (matrices[of_b] @ matrices[of_a])
    return found
