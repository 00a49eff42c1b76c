"""What a report is of: training runs and evaluations, found in the directories that it is given."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.manifest import FILE
from megatron_rapo.evaluation.of_run import evaluations_of
from megatron_rapo.evaluation.store import Evaluation

BASE = "base"


@dataclass(frozen=True)
class EvaluatedModel:
    """An evaluation and what its model is called in the report."""

    label: str
    evaluation: Evaluation


@dataclass(frozen=True)
class Sources:
    """Everything that is reported.

    Attributes:
        runs: directories of training runs.
        models: evaluated models, the base first.
        control: the base, evaluated anew with another seed, for the hard subset.
        left_out: evaluations of the runs that are not finished.
    """

    runs: tuple[Path, ...]
    models: tuple[EvaluatedModel, ...]
    control: Evaluation | None = None
    left_out: tuple[Path, ...] = ()


def open_sources(directories: Sequence[Path], control: Path | None = None) -> Sources:
    """Opens runs (with all finished evaluations in them), evaluations, and the control.

    The base is the evaluation of a run's step 0, or else the first that is given.

    Raises:
        RapoError: a directory is neither, or one is there twice.
    """
    runs: list[Path] = []
    found: list[Evaluation] = []
    unfinished: list[Path] = []
    for directory in directories:
        if not directory.is_dir():
            raise RapoError(f"{directory} is no directory; give a run's, or an evaluation's")
        if (directory / FILE).exists():
            found.append(Evaluation.open(directory))
        elif (directory / "metrics.jsonl").exists():
            runs.append(directory)
            of_run = evaluations_of(directory)
            found += map(Evaluation.open, of_run.finished)
            unfinished += of_run.unfinished
        else:
            raise RapoError(
                f"{directory} is neither a run (it has no metrics.jsonl) nor an evaluation (it has no "
                f"{FILE}); give what `megatron-rapo train` or `megatron-rapo evaluate` wrote"
            )
    repeated = [
        path
        for path, times in Counter(path.resolve() for path in [*runs, *_paths(found)]).items()
        if times > 1
    ]
    if repeated:
        raise RapoError(f"{repeated[0]} is given twice; a model is not compared with itself")
    anew = None if control is None else Evaluation.open(control)
    return Sources(tuple(runs), _named(found), anew, tuple(unfinished))


def benchmark_name(evaluation: Evaluation, data: str, setting: str) -> str:
    """What a data set at a setting is called: the setting only where there are several."""
    return data if len(evaluation.manifest.settings) == 1 else f"{data}, {setting}"


def file_name(name: str) -> str:
    """The name with nothing in it that a file system may refuse."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)


def _paths(evaluations: Sequence[Evaluation]) -> list[Path]:
    return [evaluation.directory for evaluation in evaluations]


def _named(evaluations: Sequence[Evaluation]) -> tuple[EvaluatedModel, ...]:
    """The base first, the others by run and step in the order given; names are unique."""
    models = [evaluation.manifest.model for evaluation in evaluations]
    steps, runs = [model.step for model in models], [model.run for model in models]
    base = steps.index(0) if 0 in steps else 0

    def place(i: int) -> tuple[bool, int, int]:
        step = steps[i]
        return i != base, runs.index(runs[i]), i if step is None else step

    order = sorted(range(len(evaluations)), key=place)
    several = len(set(runs) - {None}) > 1
    labels = [_label(evaluations[i], is_base=i == base, several_runs=several) for i in order]
    if len(labels) > 1 and labels[0] != BASE:
        labels[0] += f" ({BASE})"
    counted = Counter(labels)
    return tuple(
        EvaluatedModel(
            label if counted[label] == 1 else f"{label} ({evaluations[i].directory.name})", evaluations[i]
        )
        for i, label in zip(order, labels, strict=True)
    )


def _label(evaluation: Evaluation, is_base: bool, several_runs: bool) -> str:
    model = evaluation.manifest.model
    if model.step is None:
        return model.label
    if is_base:
        return BASE
    return f"{Path(model.run).name} step {model.step}" if several_runs and model.run else f"step {model.step}"
