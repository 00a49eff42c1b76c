"""A configuration from TOML files and `key=value` settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_rapo.config.explain import explain
from megatron_rapo.config.schema import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.user_code import is_named_in

# As a value in an overlay or a setting: takes back what an earlier file set.
DEFAULT = "@default"


def load_config(
    configurations: Sequence[Path | Mapping[str, Any]], settings: Sequence[str] = ()
) -> RunConfig:
    """Reads configurations (later ones overlay earlier ones), applies settings, validates.

    Tables overlay key by key; any other value replaces the earlier one, and `"@default"` removes it.

    Args:
        configurations: TOML files, or what would stand in one; the keys of mappings may be dotted.
        settings: `section.key=value`, as on the command line.

    Raises:
        RapoError: a file is missing or malformed, or an option is unknown, invalid or without effect.
    """
    values: dict[str, Any] = {}
    for one in configurations:
        _overlay(values, _tables(one) if isinstance(one, Mapping) else _read_toml(one))
    for setting in settings:
        _apply(values, setting)
    paths = [one for one in configurations if isinstance(one, Path)]
    sources = ["(a mapping)" if isinstance(one, Mapping) else str(one) for one in configurations]
    sources += ["--set"] if settings else []
    values = _without_defaults(values)
    if is_named_in(values) and isinstance(run := values.get("run"), dict):
        run.setdefault("code", _folders(paths))
    return validate(values, source=", ".join(sources))


def validate(values: dict[str, Any], source: str) -> RunConfig:
    """The typed configuration; `source` names where the values came from in errors."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise RapoError(explain(error, source, values)) from error


def _folders(paths: Sequence[Path]) -> list[str]:
    """Where code of the user's own is found: beside the configuration, or else here."""
    folders = [str(path.absolute().parent) for path in reversed(paths)]
    return list(dict.fromkeys(folders)) or [str(Path.cwd())]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RapoError(
            f"configuration {path} does not exist; examples/configs/ has some to start from"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RapoError(f"configuration {path} is not valid TOML: {error}; mend it there") from error
    except OSError as error:
        raise RapoError(f"configuration {path} cannot be read: {error.strerror}; give a TOML file") from error


def _tables(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as TOML's reader would give it: a table for each part of a dotted key."""
    tables: dict[str, Any] = {}
    for key, value in mapping.items():
        *above, last = str(key).split(".")
        inner = {last: _plain(value)}
        for part in reversed(above):
            inner = {part: inner}
        _overlay(tables, inner)
    return tables


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _tables(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _overlay(base[key], value)
        else:
            base[key] = value


def _apply(values: dict[str, Any], setting: str) -> None:
    key, _, text = (part.strip() for part in setting.partition("="))
    parts = key.split(".")
    if not setting.isascii() and setting.encode(errors="replace").decode() != setting:
        raise RapoError(f"--set {setting!a}: is no UTF-8 text; write it in UTF-8")
    if not text or len(parts) < 2 or not all(parts):
        raise RapoError(f"--set {setting}: write section.key=value, for example --set run.steps=10")
    table = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RapoError(f"--set {setting}: '{part}' is a value, not a section; write section.key=value")
    table[parts[-1]] = _toml_value(text)


def _toml_value(text: str) -> Any:
    """A TOML value; text that is none (a bare word, a path), or that is a date, is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    alone = parsed.keys() == {"value"} and isinstance(parsed["value"], bool | int | float | str | list | dict)
    return parsed["value"] if alone else text


def _without_defaults(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_defaults(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != DEFAULT
    }
