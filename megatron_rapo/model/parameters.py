"""All parameters of a model, by its family's table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache

from megatron_rapo.config import Adapter
from megatron_rapo.model.adapter_rules import adapter_rules
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.named import family_of
from megatron_rapo.model.rules import Rule


def model_rules(
    architecture: Architecture, adapter: Adapter | None = None
) -> Iterator[tuple[int | None, Rule]]:
    """Every parameter once, in the order of the model: its layer (None at the ends) and its rule.

    With `adapter` it is its adapters' alone.
    """
    if adapter is not None:
        rules = list(adapter_rules(architecture, adapter))
        for layer in range(architecture.layers):
            yield from ((layer, rule.of_layer(layer)) for rule in rules)
        return
    family = family_of(architecture)
    first, *last = [(None, rule) for rule in family.ends(architecture) if not rule.copy]
    yield first
    for layer in range(architecture.layers):
        yield from ((layer, rule.of_layer(layer)) for rule in family.layer(architecture))
    yield from last


@cache
def count_parameters(architecture: Architecture) -> int:
    """Numbers in the HF model."""
    return _count(rule for _, rule in model_rules(architecture))


def count_adapter_parameters(architecture: Architecture, adapter: Adapter) -> int:
    """Numbers in its adapters."""
    return _count(rule for _, rule in model_rules(architecture, adapter))


def count_expert_adapter_parameters(architecture: Architecture, adapter: Adapter) -> int:
    """Those of its experts' adapters."""
    rules = adapter_rules(architecture, adapter)
    return architecture.layers * _count(rule for rule in rules if rule.expert is not None)


@cache
def count_layer_parameters(architecture: Architecture) -> int:
    """Numbers in one layer."""
    return _count(family_of(architecture).layer(architecture))


@cache
def count_expert_parameters(architecture: Architecture) -> int:
    """Numbers in the experts of one layer, bar a shared one; 0 of a dense model."""
    rules = family_of(architecture).layer(architecture)
    return _count(rule for rule in rules if rule.expert is not None)


def _count(rules: Iterable[Rule]) -> int:
    return sum(math.prod(shape) for rule in rules for shape in rule.hf.values())
