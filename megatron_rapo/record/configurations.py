"""Which options a run had from which step on: `configurations.jsonl`, a line a change."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_rapo.config import RunConfig
from megatron_rapo.config.options import option_names
from megatron_rapo.config.resuming import Change, change_of, changes, options_of
from megatron_rapo.config.write import toml_value
from megatron_rapo.errors import RapoError

FILE = "configurations.jsonl"


@dataclass(frozen=True)
class Configuration:
    """The options of a run from a step on.

    Attributes:
        step: that it went on after; 0 is the beginning.
        started: UTC, ISO 8601.
        options: by dotted name.
    """

    step: int
    started: str
    options: Mapping[str, Any]


def read_configurations(directory: Path) -> list[Configuration]:
    """The run's configurations, oldest first; none where it tells none.

    Raises:
        RapoError: the file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return []
    try:
        return [Configuration(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise RapoError(
            f"{path} is no record of configurations ({error}); restore it: it tells what may not change"
        ) from error


def record_configuration(directory: Path, step: int, config: RunConfig) -> str:
    """Adds a line where options are not those of the last one; a new run's file is begun anew.

    Returns:
        What changed, for people; empty where nothing did.
    """
    before = read_configurations(directory) if step else []
    options = json.loads(json.dumps(options_of(config)))
    differing = changes(before[-1].options, options) if before else {}
    if before and not differing:
        return ""
    now = Configuration(step, datetime.now(UTC).isoformat(timespec="seconds"), options)
    partial = directory / f".{FILE}.partial"
    partial.write_text("".join(json.dumps(asdict(c)) + "\n" for c in [*before, now]), encoding="utf-8")
    partial.replace(directory / FILE)
    return f"with other options than before: {_told(differing)}" if differing else ""


def check_options(directory: Path, config: RunConfig) -> None:
    """Refuses options that a run does not go on with, or not unless it is asked to.

    Raises:
        RapoError: it names them, with their values before and now.
    """
    before = _last_options(directory)
    if before is None:
        return
    now = json.loads(json.dumps(options_of(config)))
    differing = changes(before, now)
    if not all(any(option.startswith("evaluate.") for option in options) for options in (before, now)):
        differing = {option: pair for option, pair in differing.items() if not option.startswith("evaluate.")}
    of = {change: [o for o in differing if change_of(o) is change] for change in Change}
    if of[Change.NEVER]:
        raise RapoError(
            f"run.directory = {directory} goes on with the same options alone: "
            f"{_told(differing, of[Change.NEVER])}; restore them, or choose another run.directory"
        )
    asked = [option for option in of[Change.ASKED] if option not in config.checkpoint.accept_changes]
    if asked:
        stretched = "optimizer.decay_steps" in asked and config.optimizer.decay_steps is None
        raise RapoError(
            f"run.directory = {directory} would go on with other options than before: "
            f"{_told(differing, asked)}"
            + (" (which follows run.steps: the learning rate would jump)" if stretched else "")
            + f"; restore them, or ask for it: --accept-changes {' '.join(asked)}"
        )


def check_accepted(config: RunConfig) -> None:
    """Refuses to accept changes of what is no option, or needs no acceptance, or cannot have it.

    Raises:
        RapoError: an option of `checkpoint.accept_changes` is none that can be asked for.
    """
    for option in config.checkpoint.accept_changes:
        if option not in option_names(RunConfig) or change_of(option) is not Change.ASKED:
            raise RapoError(
                f"--accept-changes {option}: this is no option whose change is to be asked for; "
                "docs/resume.md lists them"
            )


def _last_options(directory: Path) -> Mapping[str, Any] | None:
    """Those of the last start; of a run of an earlier version, which kept no record, from its config.toml."""
    configurations = read_configurations(directory)
    if configurations:
        return configurations[-1].options
    path = directory / "config.toml"
    if not path.exists():
        return None
    try:
        return options_of(RunConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))))
    except ValueError as error:
        raise RapoError(
            f"{path} cannot be read as what the run had before ({error}); mend it, or choose another "
            "run.directory"
        ) from error


def _told(differing: Mapping[str, tuple[Any, Any]], options: Sequence[str] | None = None) -> str:
    def text(value: Any) -> str:
        return "none" if value is None else toml_value(value)

    chosen = differing if options is None else options
    return ", ".join(
        f"{name} = {text(differing[name][0])}, now {text(differing[name][1])}" for name in chosen
    )
