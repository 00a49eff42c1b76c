"""Adapters as they begin: A drawn as PEFT draws it, B zero, so that the policy is the model it starts at.

Each A is drawn whole, from a seed of its name, so that every layout begins with the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rapo.config import Adapter
from megatron_rapo.model.adapter_rules import A
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import model_rules
from megatron_rapo.weights.load import fill
from megatron_rapo.weights.parameter_map import mapped_parameters


class FreshAdapters:
    """The whole matrices (`WholeTensors`).

    Args:
        architecture: of the model.
        adapter: its options.
        seed: of the run.
    """

    directory = Path("[adapter]")  # what errors would name; there is no file

    def __init__(self, architecture: Architecture, adapter: Adapter, seed: int) -> None:
        self._shapes = {
            name: shape for _, rule in model_rules(architecture, adapter) for name, shape in rule.hf.items()
        }
        self._seed = seed

    def shape(self, name: str) -> list[int]:
        """Shape of the whole matrix."""
        return list(self._shapes[name])

    def read(self, name: str, dimension: int | None, start: int, stop: int) -> Tensor:
        """The matrix `name` in fp32, or its part `start:stop` of `dimension`.

        A is uniform within ±1 / √columns: Kaiming's with a = √5, as `torch.nn.Linear` and PEFT begin.
        """
        whole = torch.zeros(self._shapes[name])
        if f".{A}." in name:
            drawn = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=7)
            generator = torch.Generator().manual_seed(int.from_bytes(drawn.digest()))
            torch.nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        return whole if dimension is None else whole.narrow(dimension, start, stop - start)


def begin_adapters(
    chunks: Sequence[GPTModel],
    architecture: Architecture,
    adapter: Adapter,
    seed: int,
    tensor_rank: int,
    expert_tensor_rank: int = 0,
) -> None:
    """Fills the adapters of this rank's chunks."""
    fresh = FreshAdapters(architecture, adapter, seed)
    for mapped in mapped_parameters(chunks, architecture, adapter):
        fill(mapped, fresh, architecture, tensor_rank, expert_tensor_rank)
