"""A configuration from TOML files and `key=value` settings, with errors that name the key."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_rapo.config.schema import RunConfig
from megatron_rapo.errors import RapoError


def load_config(paths: Sequence[Path], settings: Sequence[str] = ()) -> RunConfig:
    """Reads TOML files (later ones overlay earlier ones), applies `section.key=value` settings, validates.

    Raises:
        RapoError: a file is missing or malformed, or an option is unknown, invalid or without effect.
    """
    values: dict[str, Any] = {}
    for path in paths:
        _overlay(values, _read_toml(path))
    for setting in settings:
        _apply(values, setting)
    return validate(values, source=", ".join(map(str, paths)))


def validate(values: dict[str, Any], source: str) -> RunConfig:
    """The typed configuration; `source` names where the values came from in errors."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise RapoError(_explain(error, source)) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise RapoError(
            f"configuration {path} does not exist; examples/configs/ has some to start from"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RapoError(f"configuration {path} is not valid TOML: {error}") from error
    except OSError as error:
        raise RapoError(f"configuration {path} cannot be read: {error.strerror}") from error


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _overlay(base[key], value)
        else:
            base[key] = value


def _apply(values: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise RapoError(f"--set {setting}: write section.key=value, for example --set run.steps=10")
    table = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RapoError(f"--set {setting}: '{part}' is a value, not a section")
    table[parts[-1]] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    """A TOML value; text that is none (a bare word, a path) is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError, source: str) -> str:
    lines = [f"configuration {source} is not valid:"]
    for problem in error.errors():
        # Discriminators of unions show up in pydantic's location; they are no keys of the file.
        keys = [str(part) for part in problem["loc"] if part not in ("file", "countdown", "arithmetic")]
        where = ".".join(keys)
        if problem["type"] == "extra_forbidden":
            text = f"{where} = {json.dumps(problem['input'], default=str)} is not an option; "
            text += "docs/configuration.md lists them"
        elif problem["type"] == "missing":
            text = f"{where} is missing; set it"
        elif problem["type"] == "value_error":
            text = f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
        else:
            text = f"{where} = {json.dumps(problem['input'], default=str)}: {problem['msg']}"
        lines.append(f"  {text}")
    return "\n".join(lines)
