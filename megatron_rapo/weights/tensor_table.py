"""The tensors of a HF model and where a layout holds them, by arithmetic alone: no model is built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rapo.config import Adapter, Parallel
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import model_rules
from megatron_rapo.weights.holders import Holders, expert_holders, holders, stage_of_layer


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the HF model.

    Attributes:
        shape: as HF has it, without padding.
        cut: the dimension that tensor parallelism cuts; None if every holder has it whole.
        holders: the ranks that have it.
        vocabulary: whether its rows are the vocabulary's, which is padded before it is cut.
        unit: how many rows are left together by whoever cuts it: those of a head.
        sections: equal parts of its rows, each of which is cut by itself.
        whole_in_engines: whether ranks of an engine have all of it.
    """

    name: str
    shape: tuple[int, ...]
    cut: int | None
    holders: Holders
    vocabulary: bool = False
    unit: int = 1
    sections: int = 1
    whole_in_engines: bool = False

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def tensor_table(
    architecture: Architecture, layout: Parallel, adapter: Adapter | None = None
) -> list[HFTensor]:
    """Every tensor of the HF model, or of its adapters alone, by who holds it, in the order of the layers."""
    return sorted(_in_order(architecture, layout, adapter), key=lambda tensor: tensor.holders.copies)


def _in_order(architecture: Architecture, layout: Parallel, adapter: Adapter | None) -> Iterator[HFTensor]:
    stages = [holders(layout, stage) for stage in range(layout.pipeline_parallel)]
    for number, (layer, rule) in enumerate(model_rules(architecture, adapter)):
        if layer is None:
            stage = -1 if number else 0
        else:
            stage = stage_of_layer(layout, architecture.layers, layer)
        unit = architecture.head_dim if rule.heads else 1
        held_by = stages[stage]
        if rule.expert is not None:
            assert architecture.experts is not None
            held_by = expert_holders(layout, stage, architecture.experts.count, rule.expert)
        for name, shape in rule.hf.items():
            yield HFTensor(
                name,
                shape,
                rule.cut,
                held_by,
                rule.vocabulary,
                unit,
                rule.sections,
                rule.whole_in_engines,
            )
