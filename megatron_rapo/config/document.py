"""Renders docs/configuration.md from the models: `python -m megatron_rapo.config.document`."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from megatron_rapo.config.options import sections_of
from megatron_rapo.config.schema import RunConfig
from megatron_rapo.config.write import toml_value
from megatron_rapo.methods.options import Options
from megatron_rapo.section import Section

INTRODUCTION = """\
# Configuration

<!-- Generated: python -m megatron_rapo.config.document > docs/configuration.md -->

A run is described by TOML. An unknown key, an impossible combination, and an option that would have no
effect beside the others are errors that name the key, the value and the remedy. The resolved configuration
is written beside every run's output and can itself be run. Relative paths start at the working directory.

```toml
[run]
directory = "runs/countdown"
steps = 100

[model]
path = "models/tiny"
dtype = "float32"

[parallel]
tensor_parallel = 2

[data]
source = "countdown"
numbers = 3

[rollout]
prompts_per_step = 32
max_prompt_tokens = 128
max_response_tokens = 256

[algorithm]
divergence_coefficient = 1e-2

[evaluate]
samples = 16
k = [1, 4, 16]
```

**Overlays.** Several files may be given; each later one overlays the earlier ones key by key:
`megatron-rapo train base.toml grpo.toml`. A list is one value: it replaces the earlier list.

**Settings.** `--set section.key=value`, as often as needed, comes after all files, in order:
`--set run.steps=10 --set evaluate.data.source=countdown`. The value is TOML
(`10`, `1e-6`, `true`, `"text"`, `[1, 4]`); a bare word, a path or a date is taken as text.

**Taking back.** The value `"@default"`, in an overlay or a setting, removes what an earlier file set:
`--set algorithm.flatten_floor=@default`.

**Where no default is given**, the option may be left out; its meaning says what happens then.
"""

_WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}
_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def render() -> str:
    """The whole page, in Markdown."""
    parts = [INTRODUCTION]
    told: set[type[Section]] = set()
    for name, field in RunConfig.model_fields.items():
        if field.annotation is Options:
            parts.append(_section(name, Options, told, optional=True, chosen=field.default))
            parts += [_own_options(f"[{name}]", method) for method in sections_of(Options)]
            continue
        for section in sections_of(field.annotation):
            parts.append(_section(name, section, told, optional=not field.is_required()))
    return "\n".join(parts)


def sections() -> list[type[Section]]:
    """The sections in the page's order; a section with several sources counts once for each."""
    return [section for field in RunConfig.model_fields.values() for section in sections_of(field.annotation)]


def _section(
    name: str,
    section: type[Section],
    told: set[type[Section]],
    optional: bool,
    chosen: Section | None = None,
) -> str:
    """The section's table, and those below it that have not been told yet; its own options come first.

    `chosen` holds the defaults of options that have none of their own.
    """
    told.add(section)
    told_apart = [option for option in ("source", "kind") if option in section.model_fields]
    named = [(option, section.model_fields[option]) for option in told_apart]
    suffix = "".join(f", {option} = {_kind(field.annotation, field.metadata)}" for option, field in named)
    fields = sorted(section.model_fields.items(), key=lambda item: item[0] not in section.__annotations__)
    rows = [_row(option, field, getattr(chosen, option, None)) for option, field in fields]
    nested = [
        _section(f"{name}.{option}", table, told, optional=True)
        for option, field in fields
        for table in _own_tables(field.annotation)
        if table not in told
    ]
    return "\n".join(
        [
            f"## `[{name}]`{suffix.replace('`', '')}\n",
            f"{inspect.getdoc(section)}{' May be left out.' if optional else ''}\n",
            "| option | type | default | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
            *nested,
        ]
    )


def _own_options(heading: str, section: type[Section]) -> str:
    """What a method has beside the options of all methods, or with another default."""
    common = Options.model_fields
    own = {name: field for name, field in section.model_fields.items() if field is not common.get(name)}
    method = own.pop("method").default
    rows = [_row(option, field) for option, field in own.items() if repr(field) != repr(common.get(option))]
    head = [f'### `{heading}`, method = "{method}"\n', f"{inspect.getdoc(section)}\n"]
    return "\n".join([*head, "| option | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _own_tables(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type names, but for those that the page has under a name of their own."""
    return [section for section in sections_of(annotation) if _table_of(section) is None]


def _table_of(section: type[Section]) -> str | None:
    """The table that the page has for the section, or for one that it is the base of."""
    for name, field in RunConfig.model_fields.items():
        if any(issubclass(own, section) for own in sections_of(field.annotation)):
            return name
    return None


def _row(option: str, field: FieldInfo, chosen: Any = None) -> str:
    if field.is_required():
        default = "required" if chosen is None else f"`{toml_value(chosen)}`"
    else:
        plain = field.default is not None and not isinstance(field.default, Section)
        default = f"`{toml_value(field.default)}`" if plain else ""
    meaning = field.description or "Names this kind of source."
    cells = (f"`{option}`", _kind(field.annotation, field.metadata), default, meaning)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """A type in plain words: `integer > 0`, `"full"` or `"none"`, list of text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if sections_of(annotation):
        table = _table_of(sections_of(annotation)[0])
        return "table, below" if table is None else f"table like `[{table}]`"
    if origin is Annotated:
        base, *more = arguments
        return _kind(base, [*metadata, *(bound for part in more for bound in getattr(part, "metadata", ()))])
    if origin in (types.UnionType, Union):
        return " or ".join(_kind(part, metadata) for part in arguments if part is not type(None))
    if origin is Literal:
        return " or ".join(f"`{toml_value(value)}`" for value in arguments)
    if origin is dict:
        return "table"
    if origin is list:
        return f"list of {_kind(arguments[0], metadata)}"
    return _WORDS[annotation] + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    bounds = {name: getattr(item, name) for name in _BOUNDS for item in metadata if hasattr(item, name)}
    for strict, loose in (("gt", "ge"), ("lt", "le")):
        if strict in bounds:
            bounds.pop(loose, None)
    text = ", ".join(f"{sign} {bounds[name]}" for name, sign in _BOUNDS.items() if name in bounds)
    return f" {text}" if text else ""


if __name__ == "__main__":
    print(render(), end="")
