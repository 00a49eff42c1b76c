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
        key: its name there. All layers share one, and all experts: the checkpoint stacks them.
        layer: whose it is, or None for the model's ends.
        place: in the stack: nothing of the ends, the layer, or layer and expert.
        stack: how many there are of each.
        shape: of this part of the stack, vocabulary rows unpadded.
        rule: of which HF tensors it is a fusion.
    """

    key: str
    layer: int | None
    place: tuple[int, ...]
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    rule: Rule

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where it begins in the stack."""
        return (*self.place, *(0 for _ in self.shape))

    @property
    def part(self) -> tuple[int, ...]:
        """Its shape there."""
        return (*(1 for _ in self.place), *self.shape)

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the stack."""
        return (*self.stack, *self.shape)


def stored_parameters(architecture: Architecture) -> Iterator[StoredParameter]:
    """Every parameter of the whole model, layer after layer: what a checkpoint of it holds."""
    for layer, rule in model_rules(architecture):
        # Checkpoints know Transformer Engine's names whatever the layers were made of.
        name = rule.transformer_engine or rule.megatron
        shapes = list(rule.hf.values())
        place, stack = ((), ()) if layer is None else ((layer,), (architecture.layers,))
        if rule.expert is not None:
            assert architecture.experts is not None
            place, stack = (*place, rule.expert), (*stack, architecture.experts.count)
            name = name.replace(f"experts.{rule.expert}.", "experts.experts.")
        yield StoredParameter(
            key=name if layer is None else f"decoder.layers.{name}",
            layer=layer,
            place=place,
            stack=stack,
            shape=(sum(shape[0] for shape in shapes), *shapes[0][1:]),
            rule=rule,
        )
