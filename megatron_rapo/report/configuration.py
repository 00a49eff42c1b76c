"""What was run, and with which software: options of runs and manifests of evaluations, as tables."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rapo.config.resuming import changes
from megatron_rapo.config.write import toml_value
from megatron_rapo.errors import RapoError
from megatron_rapo.record.configurations import read_configurations
from megatron_rapo.record.versions import read_versions
from megatron_rapo.report.sources import EvaluatedModel, Sources
from megatron_rapo.timeline.simulated import shown_name


@dataclass(frozen=True)
class Table:
    """Options down, runs or evaluations across.

    Attributes:
        title: what it is about.
        columns: names of the runs or evaluations.
        rows: an option and its value in each column, empty where it has none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    def sections(self) -> list[tuple[str, list[tuple[str, tuple[str, ...]]]]]:
        """The rows by what stands before their option's first dot; those without one first."""
        grouped: dict[str, list[tuple[str, tuple[str, ...]]]] = {"": []}
        for option, values in self.rows:
            section, dot, name = option.partition(".")
            grouped.setdefault(section if dot else "", []).append((name if dot else option, values))
        return [(section, rows) for section, rows in grouped.items() if rows]

    @staticmethod
    def differs(values: Sequence[str]) -> bool:
        """Whether the columns do not agree."""
        return len(set(values)) > 1


def configuration_tables(sources: Sources) -> list[Table]:
    """Options of training runs, of evaluations, and versions of software; those that there are."""
    tables = []
    if sources.runs:
        names = list(map(shown_name, sources.runs))
        tables.append(_table("Training", names, [_run_options(path) for path in sources.runs]))
        software = [_run_versions(path) for path in sources.runs]
        if any(software):
            tables.append(_table("Software of the training", names, software))
    if sources.models:
        names = [model.label for model in sources.models]
        manifests = [_manifest(model) for model in sources.models]
        tables.append(_table("Evaluation", names, manifests))
        versions = [model.evaluation.manifest.versions for model in sources.models]
        tables.append(_table("Software of the evaluations", names, versions))
    return tables


def _table(title: str, names: Sequence[str], columns: Sequence[Mapping[str, str]]) -> Table:
    options = dict.fromkeys(option for column in columns for option in column)
    rows = [(option, tuple(column.get(option, "") for column in columns)) for option in options]
    return Table(title, tuple(names), tuple(rows))


def _run_options(directory: Path) -> dict[str, str]:
    """Each option's value, and from which step on it had another."""
    now = _configuration(directory)
    history = read_configurations(directory)
    for start, following in itertools.pairwise(history):
        for option, (old, new) in changes(start.options, following.options).items():
            before = now.get(option, _text(old)) if "after step" in now.get(option, "") else _text(old)
            now[option] = f"{before}; after step {following.step}: {_text(new)}"
        for option, modules in start.other_code(following).items():
            before = now.get(option, _text(start.options[option]))
            now[option] = f"{before}; after step {following.step}: other code in {' and '.join(modules)}"
    return now


def _text(value: Any) -> str:
    return "none" if value is None else toml_value(value)


def _configuration(directory: Path) -> dict[str, str]:
    path = directory / "config.toml"
    try:
        return _flat(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RapoError(
            f"{path} cannot be read: {error}; restore the configuration that the run wrote there"
        ) from error


def _run_versions(directory: Path) -> dict[str, str]:
    """Each library's version, and from which step on it had another; nothing of a run that tells none."""
    told: dict[str, list[str]] = {}
    last: Mapping[str, str] = {}
    for start in read_versions(directory):
        for name in dict.fromkeys([*last, *start.versions]):
            if start.versions.get(name) != last.get(name):
                since = f"after step {start.step}: " if last else ""
                told.setdefault(name, []).append(f"{since}{start.versions.get(name, 'none')}")
        last = start.versions
    return {name: "; ".join(changes) for name, changes in told.items()}


def _manifest(model: EvaluatedModel) -> dict[str, str]:
    record = json.loads(model.evaluation.manifest.model_dump_json(exclude={"versions", "format"}))
    for name in ("data", "settings"):
        record[name] = {entry.pop("name"): entry for entry in record[name]}
    return _flat(record)


def _flat(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        inner = (*path, name)
        flat |= _flat(value, inner) if isinstance(value, dict) else {".".join(inner): toml_value(value)}
    return flat
