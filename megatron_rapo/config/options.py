"""A walk over the options that the configuration's models declare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from megatron_rapo.engines.kinds import KINDS
from megatron_rapo.engines.options import EngineOptions
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.options import Options
from megatron_rapo.section import Section


def sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type names: one, the members of a union, or none for a plain option.

    Those of `[algorithm]` are the options of each method that has a name, those of `[rollout.engine]` of each
    such kind.
    """
    if annotation is Options:
        return [method.Options for method in METHODS.values()]
    if annotation is EngineOptions:
        return [kind.Options for kind in KINDS.values()]
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def option_names(model: type[Section], prefix: str = "") -> Iterator[str]:
    """Every key under `model`, sections included, as written after `--set`: `run`, `run.steps`, ..."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in sections_of(field.annotation):
            yield from option_names(section, f"{prefix}{name}.")
