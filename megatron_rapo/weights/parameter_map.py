"""A family's table on its models: a rank's parameters with their HF tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.named import family_of
from megatron_rapo.model.layer_spec import uses_transformer_engine
from megatron_rapo.model.rules import Rule


@dataclass(frozen=True)
class MappedParameter:
    """A parameter of this rank with its rule, the HF names filled in."""

    parameter: torch.nn.Parameter
    rule: Rule


def mapped_parameters(chunks: Sequence[GPTModel], architecture: Architecture) -> Iterator[MappedParameter]:
    """Every parameter of this rank's chunks with the HF tensors that it holds slices of.

    Raises:
        RapoError: a parameter that the family's table does not know.
    """
    family = family_of(architecture)
    layer_rules = {local_name(rule): rule for rule in family.layer(architecture)}
    end_rules = {rule.megatron: rule for rule in family.ends(architecture)}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, index, inner = name.split(".", 3)
                rule = layer_rules.get(inner)
                if rule is not None:
                    # layer_number counts from 1 over the whole model; the index only within this chunk.
                    rule = rule.of_layer(chunk.decoder.layers[int(index)].layer_number - 1)
            else:
                rule = end_rules.get(name)
            if rule is None:
                raise RapoError(f"parameter {name} has no counterpart in HF models of {architecture.family}")
            yield MappedParameter(parameter, rule)


def local_name(rule: Rule) -> str:
    """The name of a rule's parameter in the models of this machine."""
    return rule.transformer_engine if rule.transformer_engine and uses_transformer_engine() else rule.megatron
