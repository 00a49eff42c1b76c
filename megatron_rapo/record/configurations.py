"""Which options and code a run had from which step on: `configurations.jsonl`, a line a change."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_rapo.config import RunConfig
from megatron_rapo.config.code import addresses_in, modules_of
from megatron_rapo.config.options import option_names
from megatron_rapo.config.resuming import Change, change_of, changes, options_of
from megatron_rapo.config.write import toml_value
from megatron_rapo.errors import RapoError
from megatron_rapo.record.lines import read_lines, write_lines

FILE = "configurations.jsonl"


@dataclass(frozen=True)
class Configuration:
    """The options of a run from a step on.

    Attributes:
        step: that it went on after; 0 is the beginning.
        started: UTC, ISO 8601.
        options: by dotted name.
        code: of options that name code of the user's own, each module's fingerprint.
    """

    step: int
    started: str
    options: Mapping[str, Any]
    code: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig, step: int) -> Configuration:
        """That of a run which goes on after a step now."""
        options = json.loads(json.dumps(options_of(config)))
        code = {
            option: {
                module: fingerprint
                for address in addresses_in({option: value})
                for module, fingerprint in modules_of(address, config.run.code).items()
            }
            for option, value in options.items()
        }
        started = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(step, started, options, {option: modules for option, modules in code.items() if modules})

    def other_code(self, now: Configuration) -> dict[str, list[str]]:
        """Options whose value is the same but whose code is another: the modules that changed."""
        return {
            option: [m for m in dict.fromkeys([*code, *then]) if code.get(m) != then.get(m)]
            for option, code in self.code.items()
            if (then := now.code.get(option, code)) != code
            and self.options.get(option) == now.options.get(option)
        }


def read_configurations(directory: Path) -> list[Configuration]:
    """The run's configurations, oldest first; none where it tells none.

    Raises:
        RapoError: the file is damaged.
    """
    return read_lines(
        directory / FILE,
        Configuration,
        of="configurations",
        remedy="restore it: it tells what may not change",
    )


def record_configuration(directory: Path, step: int, config: RunConfig) -> str:
    """Adds a line where options or code are not those of the last one; a new run's file is begun anew.

    Returns:
        What changed, for people; empty where nothing did.
    """
    before = read_configurations(directory) if step else []
    now = Configuration.of(config, step)
    differing = changes(before[-1].options, now.options) if before else {}
    code = before[-1].other_code(now) if before else {}
    if before and not (differing or code):
        return ""
    write_lines(directory / FILE, [*before, now])
    told = [f"other options than before: {_told(differing)}"] if differing else []
    told += [f"other code than before: {_told_code(code, now)}"] if code else []
    return f"with {'; and with '.join(told)}" if told else ""


def check_options(directory: Path, config: RunConfig) -> None:
    """Refuses options and code that a run does not go on with, or not unless it is asked to.

    Raises:
        RapoError: it names them, with their values before and now.
    """
    before = _last(directory)
    if before is None:
        return
    now = Configuration.of(config, before.step)
    differing = changes(before.options, now.options)
    evaluated = [any(option.startswith("evaluate.") for option in one.options) for one in (before, now)]
    if not all(evaluated):
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
    code = {
        option: modules
        for option, modules in before.other_code(now).items()
        if change_of(option) is Change.ASKED and option not in config.checkpoint.accept_changes
    }
    if code:
        raise RapoError(
            f"run.directory = {directory} would go on with other code than before: {_told_code(code, now)}; "
            f"restore it, or ask for it: --accept-changes {' '.join(code)}"
        )


def check_accepted(config: RunConfig) -> None:
    """Refuses to accept changes of what is no option, or needs no acceptance, or cannot have it.

    Raises:
        RapoError: an option of `checkpoint.accept_changes` is none that can be asked for.
    """
    if not config.checkpoint.accept_changes:
        return
    before = _last(config.run.directory)
    # Options of the user's own methods and environments stand in configurations alone.
    known = {*option_names(RunConfig), *options_of(config), *(before.options if before else ())}
    for option in config.checkpoint.accept_changes:
        if option not in known or change_of(option) is not Change.ASKED:
            raise RapoError(
                f"--accept-changes {option}: this is no option whose change is to be asked for; "
                "docs/resume.md lists them"
            )


def _last(directory: Path) -> Configuration | None:
    """That of the last start; of a run of an earlier version, which kept no record, from its config.toml."""
    configurations = read_configurations(directory)
    if configurations:
        return configurations[-1]
    path = directory / "config.toml"
    if not path.exists():
        return None
    try:
        config = RunConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RapoError(
            f"{path} cannot be read as what the run had before ({error}); mend it, or choose another "
            "run.directory"
        ) from error
    return Configuration(0, "", options_of(config))


def _told_code(code: Mapping[str, Sequence[str]], now: Configuration) -> str:
    return ", ".join(
        f"{option} = {toml_value(now.options[option])}, whose {' and '.join(modules)} changed"
        for option, modules in code.items()
    )


def _told(differing: Mapping[str, tuple[Any, Any]], options: Sequence[str] | None = None) -> str:
    def text(value: Any) -> str:
        return "none" if value is None else toml_value(value)

    chosen = differing if options is None else options
    return ", ".join(
        f"{name} = {text(differing[name][0])}, now {text(differing[name][1])}" for name in chosen
    )
