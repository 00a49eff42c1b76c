"""The tensors of a HF model and where a layout holds them, by arithmetic alone: no model is built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_rapo.config import Parallel
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.weights.parameter_map import ENDS, LAYER, Rule, hf_shapes

Shape = tuple[int, ...]

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # whose rows are padded before they are cut


@dataclass(frozen=True)
class HFTensor:
    """A tensor of the HF model.

    Attributes:
        shape: as HF has it, without padding.
        cut: the dimension that tensor parallelism cuts; None if every rank holds it whole.
        stage: the pipeline stage that it is sent from.
    """

    name: str
    shape: Shape
    cut: int | None
    stage: int

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def tensor_table(architecture: Architecture, layout: Parallel) -> list[HFTensor]:
    """Every tensor of the HF model, by stage, in the order of the layers."""
    return sorted(_in_order(architecture, layout), key=lambda tensor: tensor.stage)


def _in_order(architecture: Architecture, layout: Parallel) -> Iterator[HFTensor]:
    stages = layout.pipeline_parallel
    layers_per_chunk = architecture.layers // (stages * (layout.virtual_pipeline_parallel or 1))
    shapes = hf_shapes(architecture)
    embedding, *ends = _present(ENDS, shapes)
    layer = _present(LAYER, shapes)
    yield HFTensor(*embedding, stage=0)
    for index in range(architecture.layers):
        stage = index // layers_per_chunk % stages  # chunks are dealt to the stages in turn
        for name, shape, cut in layer:
            yield HFTensor(f"model.layers.{index}.{name}", shape, cut, stage)
    for end in ends:
        yield HFTensor(*end, stage=stages - 1)


def _present(rules: Sequence[Rule], shapes: Mapping[str, Shape]) -> list[tuple[str, Shape, int | None]]:
    """Name, shape and cut of the tensors that an architecture has, in the table's order."""
    return [(name, shapes[name], rule.cut) for rule in rules for name in rule.hf if name in shapes]
