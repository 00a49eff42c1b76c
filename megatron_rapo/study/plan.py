"""The runs of a study: each arm at each seed, as ordinary commands with their folders."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.resuming import options_of
from megatron_rapo.config.write import toml_value
from megatron_rapo.errors import RapoError
from megatron_rapo.study.arms import PlannedArm
from megatron_rapo.study.schema import Options, Study

Stage = Literal["tuning", "main"]

FOLLOWED, RUN = "followed", "@run"  # what stands for the run that another one follows (`following`)
EVALUATION = "study"  # name of the evaluation after training, in a run's evaluations/
# Where and how a run is kept and watched: another value of these is the same run.
_ELSEWHERE = ("run.directory", "run.code", "checkpoint", "observe", "slurm", "rollout.engine", "weights")


@dataclass(frozen=True)
class PlannedRun:
    """One run folder, and the commands that make it.

    Attributes:
        name: of its folder and its result; unique in the study.
        arm: the arm's name.
        seed: of the study; `run.seed` is it plus the arm's offset.
        trial: number of the setting in the search; None in the main stage.
        configs, settings: as on the command line.
        evaluation: options of `[evaluate]` after training; None: the run's own last evaluation counts.
        diagnosed: correct responses that are laid beside the base's; 0: none.
        following: options whose value is a folder of the run that it follows.
        config: what they come to.
        cores: that it keeps busy.
    """

    name: str
    arm: str
    seed: int
    stage: Stage
    trial: int | None
    train: bool
    configs: Sequence[Path]
    settings: Options
    evaluation: Options | None
    diagnosed: int
    following: Sequence[str]
    config: RunConfig
    cores: int

    @property
    def directory(self) -> Path:
        """Of the run."""
        return self.config.run.directory

    @property
    def judged(self) -> Path | None:
        """The evaluation that holds the outcome; None: the run's last one."""
        return self.directory / "evaluations" / EVALUATION if self.evaluation is not None else None

    def commands(self) -> list[list[str]]:
        """The words after `megatron-rapo`, one command after the other."""
        files = list(map(str, self.configs))
        commands = []
        if self.train:
            commands.append(["train", *files, "--set", *_settings(self.settings)])
        if self.judged is not None:
            evaluated = {
                **self.settings,
                **{f"evaluate.{key}": v for key, v in (self.evaluation or {}).items()},
            }
            model = ["--model", str(self.directory / "model")] if self.train else []
            where = [*model, "--out", str(self.judged)]
            commands.append(["evaluate", *files, *where, "--set", *_settings(evaluated)])
        return commands

    def identity(self) -> dict[str, Any]:
        """What makes its result this run's and no other's, by name."""
        options = {option: value for option, value in options_of(self.config).items() if is_identity(option)}
        options |= dict.fromkeys(self.following, RUN)  # the study's folder may be elsewhere
        judged = {f"evaluation.{key}": value for key, value in (self.evaluation or {}).items()}
        found: dict[str, Any] = json.loads(json.dumps({**options, **judged, "train": self.train}))
        return found


def is_identity(option: str) -> bool:
    """Whether another value of the option makes another run."""
    return not any(option == name or option.startswith(f"{name}.") for name in _ELSEWHERE)


def told(command: Sequence[str]) -> str:
    """A command as it is typed."""
    return shlex.join(["megatron-rapo", *command])


def main_runs(
    study: Study, pairs: Sequence[tuple[PlannedArm, int]], folder: Path, tuned: Mapping[str, Options]
) -> list[PlannedRun]:
    """The study's own runs.

    Args:
        pairs: arms and seeds, in the order in which they are run.
        folder: of the study's runs and results.
        tuned: the options that the search chose, by arm.

    Raises:
        RapoError: a configuration is not valid, or two runs would share a folder.
    """
    runs = [
        _run(study, arm, seed, "main", None, tuned.get(arm.follows or arm.name, {}), folder)
        for arm, seed in pairs
    ]
    return _distinct(runs)


def tuning_runs(
    study: Study, arms: Sequence[PlannedArm], trials: Mapping[str, Sequence[Options]], folder: Path
) -> list[PlannedRun]:
    """Each trial of each arm at each of the search's seeds.

    Raises:
        RapoError: as of `main_runs`.
    """
    if study.tuning is None:
        return []
    runs = [
        _run(study, arm, seed, "tuning", number, {**settings, **_dotted(study.tuning.options)}, folder)
        for seed in study.tuning.seeds
        for arm in arms
        for number, settings in enumerate(trials.get(arm.name, ()))
    ]
    return _distinct(runs)


def _run(
    study: Study, arm: PlannedArm, seed: int, stage: Stage, trial: int | None, last: Options, folder: Path
) -> PlannedRun:
    number = "" if trial is None else f"-{trial:02d}"
    name = f"{'' if stage == 'main' else 'tuning-'}{file_name(arm.name)}{number}-seed{seed}"
    follows = f"{file_name(arm.follows)}-seed{seed}" if arm.follows else None
    first = str(folder / FOLLOWED / follows) if follows else RUN
    own = _dotted(arm.options)
    settings = {
        **{option: first if value == RUN else value for option, value in own.items()},
        **last,
        "run.seed": seed + arm.seed_offset,
        "run.directory": str(folder / "runs" / name),
    }
    if "run.seed" in {**arm.options, **last}:
        raise RapoError(f"arm {toml_value(arm.name)} sets run.seed, which the study's seeds give; remove it")
    configs = [*study.configs, *arm.configs]
    try:
        config = load_config(configs, _settings(settings))
        # Its own search's evaluation is that of the run.
        evaluation = _dotted(study.evaluation) if study.evaluation and stage == "main" else None
        evaluation = evaluation if arm.train or evaluation is not None else {}
        if evaluation is not None:
            evaluated = {f"evaluate.{key}": value for key, value in evaluation.items()}
            judged = load_config(configs, _settings({**settings, **evaluated}))
        else:
            judged = config
    except RapoError as error:
        raise RapoError(f"arm {toml_value(arm.name)}: {error}") from error
    if judged.evaluate is None:
        raise RapoError(
            f"arm {toml_value(arm.name)} has no held-out problems; add [evaluate] to its configuration, or "
            "[evaluation] to the study"
        )
    return PlannedRun(
        name=name,
        arm=arm.name,
        seed=seed,
        stage=stage,
        trial=trial,
        train=arm.train,
        configs=configs,
        settings=settings,
        evaluation=evaluation,
        diagnosed=study.diagnose or 0 if arm.train and stage == "main" else 0,
        following=[option for option, value in own.items() if value == RUN],
        config=config,
        cores=study.cores_per_run or config.parallel.world_size if arm.train else 1,
    )


def _distinct(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    by_name: dict[str, PlannedRun] = {}
    for run in runs:
        if run.name in by_name:
            raise RapoError(
                f"arms {toml_value(by_name[run.name].arm)} and {toml_value(run.arm)} would share the folder "
                f"{run.directory}; give one of them another name"
            )
        by_name[run.name] = run
    return list(runs)


def _dotted(options: Mapping[str, Any], prefix: str = "") -> Options:
    """Nested tables as dotted names, as `run.steps = 3` in TOML gives them; empty tables stay values."""

    def walk(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict) and value and f"{above}{key}" not in ("evaluate.data",):
                yield from walk(value, f"{above}{key}.")
            else:
                yield f"{above}{key}", value

    return dict(walk(options, prefix))


def _settings(options: Mapping[str, Any]) -> list[str]:
    return [f"{option}={toml_value(value)}" for option, value in options.items()]


def file_name(name: str) -> str:
    """The name with nothing in it that a file system may refuse."""
    return re.sub(r"[^A-Za-z0-9.=-]+", "_", name).strip("_.")
