"""A configuration as TOML text, as written beside a run's output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rapo.config.schema import RunConfig


def to_toml(config: RunConfig) -> str:
    """The resolved configuration; `load_config` on it gives `config` again."""
    lines = _table(config.resolved(), ())
    return "\n".join(lines).lstrip("\n") + "\n"


def _table(values: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    plain = [f"{key} = {toml_value(value)}" for key, value in values.items() if key not in tables]
    # A table without options of its own still stands: `[evaluate]` alone turns evaluation on.
    heading = ["", f"[{'.'.join(path)}]"] if path else []
    nested = [line for key, value in tables.items() for line in _table(value, (*path, key))]
    return [*heading, *plain, *nested]


def toml_value(value: Any) -> str:
    """JSON's strings, numbers, booleans and lists are TOML's too, but for one character and tables."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml_value(inner)}' for key, inner in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, date | time):  # of a file; no option is one, but errors show what was given
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
