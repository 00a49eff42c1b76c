"""A family's table on its models: a rank's parameters with their HF tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_rapo.config import Adapter
from megatron_rapo.errors import RapoError
from megatron_rapo.model.adapter_rules import MODULE, adapter_rules
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.named import family_of
from megatron_rapo.model.layer_spec import uses_transformer_engine
from megatron_rapo.model.rules import Rule

# Megatron's own experts are modules one by one, those of Transformer Engine numbered weights of one module.
_OF_EXPERT = re.compile(
    r"mlp\.experts\.(local_experts\.(?P<alone>\d+)\.)?(?P<linear>linear_fc[12])\."
    rf"(?P<own>weight|{MODULE}\.\w+?)(?P<grouped>\d+)?"
)


@dataclass(frozen=True)
class MappedParameter:
    """A parameter of this rank with its rule, the HF names filled in."""

    parameter: torch.nn.Parameter
    rule: Rule


def mapped_parameters(
    chunks: Sequence[GPTModel], architecture: Architecture, adapter: Adapter | None = None
) -> Iterator[MappedParameter]:
    """Every parameter of this rank's chunks with the HF tensors that it holds slices of.

    Without `adapter` it is the model's own parameters; with it, its adapters' alone.

    Raises:
        RapoError: a parameter that the family's table does not know.
    """
    family = family_of(architecture)
    rules = family.layer(architecture) if adapter is None else adapter_rules(architecture, adapter)
    layer_rules = {local_name(rule): rule for rule in rules}
    end_rules = {rule.megatron: rule for rule in family.ends(architecture)}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if (f".{MODULE}." in name) != (adapter is not None):
                continue
            if name.startswith("decoder.layers."):
                _, _, index, inner = name.split(".", 3)
                layer = chunk.decoder.layers[int(index)]
                rule = layer_rules.get(_of_whole_layer(inner, layer))
                if rule is not None:
                    # layer_number counts from 1 over the whole model; the index only within this chunk.
                    rule = rule.of_layer(layer.layer_number - 1)
            else:
                rule = end_rules.get(name)
            if rule is None:
                raise RapoError(f"parameter {name} has no counterpart in HF models of {architecture.family}")
            yield MappedParameter(parameter, rule)


def _of_whole_layer(name: str, layer: Any) -> str:
    """An expert's parameter by its number in the layer, in place of its number on this rank."""
    found = _OF_EXPERT.fullmatch(name)
    if found is None:
        return name
    here = int(found["alone"] or found["grouped"])
    return f"mlp.experts.{layer.mlp.local_expert_indices[here]}.{found['linear']}.{found['own']}"


def local_name(rule: Rule) -> str:
    """The name of a rule's parameter in the models of this machine."""
    return rule.transformer_engine if rule.transformer_engine and uses_transformer_engine() else rule.megatron
