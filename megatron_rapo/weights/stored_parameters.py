"""A family's table on its checkpoints: the parameters of a whole model with their HF tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import model_rules
from megatron_rapo.model.rules import Rule


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of the whole model, as Megatron checkpoints store it.

    Attributes:
        key: its name there. All layers share one: the checkpoint stacks them.
        layer: its place in the stack, or None for the model's ends.
        shape: of this layer's part, vocabulary rows unpadded.
        rule: of which HF tensors it is a fusion.
    """

    key: str
    layer: int | None
    shape: tuple[int, ...]
    rule: Rule


def stored_parameters(architecture: Architecture) -> Iterator[StoredParameter]:
    """Every parameter of the whole model, layer after layer: what a checkpoint of it holds."""
    for layer, rule in model_rules(architecture):
        # Checkpoints know Transformer Engine's names whatever the layers were made of.
        name = rule.transformer_engine or rule.megatron
        shapes = list(rule.hf.values())
        yield StoredParameter(
            key=name if layer is None else f"decoder.layers.{name}",
            layer=layer,
            shape=(sum(shape[0] for shape in shapes), *shapes[0][1:]),
            rule=rule,
        )
