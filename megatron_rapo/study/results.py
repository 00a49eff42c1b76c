"""What a run came to, in a small table that outlives its folder: `results/RUN.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rapo.config.resuming import changes
from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole
from megatron_rapo.observe.step_lines import read_step_lines
from megatron_rapo.study.diagnosed import Diagnosed, diagnose
from megatron_rapo.study.plan import PlannedRun, told

FORMAT = 1
FOLDER = "results"
SHOWN = 5  # options in a message
# What is kept of each step, where a run has it; and all of its evaluations' pass@k and rewards.
PATHS = ("reward/mean", "loss/entropy", "loss/divergence", "rollout/response_tokens_mean")
# By step what a run has taken so far, and the metric that is summed.
COMPUTE = {"tokens": "loss/tokens", "tflop": "compute/update_tflop"}
_EVALUATED = re.compile(r"evaluate/(.*/)?(reward|pass@\d+)")


@dataclass(frozen=True)
class Judged:
    """How a run's model did on one data set at one setting.

    Attributes:
        problems: a fingerprint of each problem's question and answer, in order.
        samples, correct: `[problems]`.
        reward: `[problems]` mean rewards of the known ones; None where they are right or wrong alone.
    """

    problems: Sequence[str]
    samples: Sequence[int]
    correct: Sequence[int]
    reward: Sequence[float | None] | None


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        identity: the options that made it (`PlannedRun.identity`).
        commands: as they are typed.
        commit: of the source that ran, where it is a repository.
        seconds: that its commands took; without those that were killed.
        tokens: response tokens that it trained on; 0 of a model as it is.
        judged: by `DATA/SETTING`.
        diagnosed: by `DATA/SETTING`, its correct responses beside the model that it began as; empty where the
            study asks for none.
        steps: of `paths`.
        paths: by metric, `[steps]`; None where a step has no such value. Those of `COMPUTE` count from the
            start; results of old may have tokens alone.
    """

    format: int
    run: str
    arm: str
    seed: int
    stage: str
    trial: int | None
    identity: Mapping[str, Any]
    commands: Sequence[str]
    commit: str | None
    versions: Mapping[str, str]
    finished: str
    seconds: float
    cores: int
    tokens: float
    judged: Mapping[str, Judged]
    steps: Sequence[int]
    paths: Mapping[str, Sequence[float | None]]
    diagnosed: Mapping[str, Diagnosed] = field(default_factory=dict)

    @property
    def core_hours(self) -> float:
        """Cores that were kept for it, by its time."""
        return self.seconds * self.cores / 3600

    def write(self, folder: Path) -> None:
        """Leaves it in the study's folder, whole."""
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        values = {**vars(self), **{table: _plain(getattr(self, table)) for table in ("judged", "diagnosed")}}
        write_whole(file_of(folder, self.run), json.dumps(values, separators=(",", ":")) + "\n")


def _plain(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {name: asdict(one) for name, one in tables.items()}


def file_of(folder: Path, run: str) -> Path:
    """Where a run's result is."""
    return folder / FOLDER / f"{run}.json"


def read_result(file: Path) -> Result:
    """Reads one.

    Raises:
        RapoError: it is half-written, damaged, or of another format.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, not {FORMAT}")
        judged = {name: Judged(**one) for name, one in values["judged"].items()}
        diagnosed = {name: Diagnosed(**one) for name, one in values.get("diagnosed", {}).items()}
        result = Result(**{**values, "judged": judged, "diagnosed": diagnosed})
        for one in result.judged.values():
            columns = [one.samples, one.correct, one.reward if one.reward is not None else one.correct]
            if {len(column) for column in columns} != {len(one.problems)}:
                raise ValueError("its columns differ in length")
        return result
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RapoError(
            f"{file} is no whole result ({error!r}); remove it: the study makes it anew from its run's folder"
        ) from error


def read_planned(folder: Path, runs: Sequence[PlannedRun]) -> dict[str, Result]:
    """The results that are there of these runs, by name.

    Raises:
        RapoError: one is damaged, or of another configuration than the study has now.
    """
    found = {}
    for run in runs:
        if (file := file_of(folder, run.name)).exists():
            found[run.name] = read_result(file)
            check_same(found[run.name].identity, run, str(file))
    return found


def check_same(before: Mapping[str, Any], run: PlannedRun, where: str) -> None:
    """Refuses what was made by other options. Those that came with later versions count as their default.

    Raises:
        RapoError: it names them.
    """
    refuse_other(changes(before, run.identity()), run, where)


def refuse_other(differing: Mapping[str, tuple[Any, Any]], run: PlannedRun, where: str) -> None:
    """Raises RapoError where options differ, each with its value before and now."""
    if differing:
        pairs = [f"{name} = {old!r}, now {new!r}" for name, (old, new) in differing.items()]
        more = f"; and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
        raise RapoError(
            f"{where} is of another configuration than arm {run.arm!r}, seed {run.seed}, has now: "
            f"{'; '.join(pairs[:SHOWN])}{more}; restore the options, give the arm another name, or remove "
            f"what is there ({run.directory} and its result)"
        )


def collect(
    run: PlannedRun, seconds: float, *, commit: str | None, finished: str, versions: Mapping[str, str]
) -> Result:
    """Makes the result of a run whose commands have ended.

    Raises:
        RapoError: its folder has no finished evaluation, or cannot be read.
    """
    steps = read_step_lines(run.directory / "metrics.jsonl")
    evaluated = {name for line in steps for name in line if _EVALUATED.fullmatch(name)}
    compute = {
        name: np.cumsum([line.get(metric) or 0.0 for line in steps]).tolist()
        for name, metric in COMPUTE.items()
    }
    return Result(
        format=FORMAT,
        run=run.name,
        arm=run.arm,
        seed=run.seed,
        stage=run.stage,
        trial=run.trial,
        identity=run.identity(),
        commands=[told(command) for command in run.commands()],
        commit=commit,
        versions=versions,
        finished=finished,
        seconds=round(seconds, 1),
        cores=run.cores,
        tokens=compute["tokens"][-1] if steps else 0.0,
        judged=dict(_judged(run)),
        diagnosed=diagnose(run),
        steps=[line["step"] for line in steps],
        paths={
            **compute,
            **{
                name: [_short(line.get(name)) for line in steps]
                for name in (*PATHS, *sorted(evaluated))
                if any(line.get(name) is not None for line in steps)
            },
        },
    )


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _judged(run: PlannedRun) -> Iterator[tuple[str, Judged]]:
    from megatron_rapo.evaluation.of_run import evaluations_of
    from megatron_rapo.evaluation.store import Evaluation
    from megatron_rapo.fingerprint import fingerprint

    directory = run.judged
    if directory is None:
        of_run = evaluations_of(run.directory).finished
        last = [path for path in of_run if path.name == f"step_{run.config.run.steps:06d}"]
        if not last:
            raise RapoError(
                f"{run.directory} has no finished evaluation of its last step; remove the folder and run the "
                "study again"
            )
        [directory] = last
    evaluation = Evaluation.open(directory)
    if evaluation.manifest.finished is None:
        raise RapoError(f"{directory} is not finished; run the study again, which goes on")
    if evaluation.manifest.adaptive is not None:
        raise RapoError(f"{directory} has an adaptive budget, which a study has no use of; remove it")
    for data, setting in evaluation:
        store = evaluation.samples(data, setting)
        counts = store.counts()
        yield (
            f"{data}/{setting}",
            Judged(
                problems=[fingerprint([one.question, one.answer])[:10] for one in store.problems],
                samples=counts.samples.tolist(),
                correct=counts.correct.tolist(),
                reward=_rewards(store.read(["problem", "outcome", "reward"]), counts.problems),
            ),
        )


def _rewards(samples: Any, problems: Sequence[str]) -> list[float | None] | None:
    """The mean of each problem's known rewards; None where rewards say no more than outcomes."""
    from megatron_rapo.evaluation.counts import codes
    from megatron_rapo.evaluation.mean_reward import are_graded

    samples = samples.unify_dictionaries()
    if not are_graded(samples):
        return None
    rewards = samples["reward"].to_numpy()
    known = ~np.isnan(rewards)
    rows = codes(samples["problem"], {name: place for place, name in enumerate(problems)})
    number = np.bincount(rows[known], minlength=len(problems))
    total = np.bincount(rows[known], rewards[known], minlength=len(problems))
    return [float(t / n) if n else None for t, n in zip(total, number, strict=True)]
