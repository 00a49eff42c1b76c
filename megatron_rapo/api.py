"""`megatron_rapo.train` and `evaluate`: what the commands of these names do (docs/python.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.date import recorded_date, with_date

if TYPE_CHECKING:
    from megatron_rapo.launch.environment import RankEnvironment


@dataclass(frozen=True)
class Trained:
    """What a run came to.

    Attributes:
        directory: of the run: `model/` and what else it leaves.
        metrics: of its last step, by the names of metrics.jsonl.
    """

    directory: Path
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation came to.

    Attributes:
        directory: of its samples, results.json and results.csv.
        metrics: `DATA/SETTING/METRIC` by the names of results.csv, and of what has an interval also
            `…_low` and `…_high`.
    """

    directory: Path
    metrics: Mapping[str, float]


Configuration = str | Path | Mapping[str, Any]
"""A TOML file, or what would stand in one; the keys of a mapping may be dotted: `{"run.steps": 20}`."""


def train(configuration: Configuration, *overlays: Configuration) -> Trained:
    """Trains a run to its last step, or goes on with it, as `megatron-rapo train` does.

    ```python
    trained = megatron_rapo.train("run.toml", {"run.steps": 20, "optimizer.learning_rate": 1e-5})
    print(trained.metrics["reward/mean"])
    ```
    Under torchrun and srun the process that calls it is one rank; else it starts the ranks, and watches them.

    Args:
        configuration: of the run.
        overlays: on it, later ones over earlier ones, as files and `--set` of the command line.

    Raises:
        RapoError: the run cannot be as it is configured, or failed.
        KeyboardInterrupt, SystemExit: SIGINT or another stop signal came; the step is saved (docs/resume.md).
    """
    from megatron_rapo.observe.step_lines import read_step_lines

    config = load_config(_sources([configuration, *overlays]))
    run(config)
    steps = read_step_lines(config.run.directory / "metrics.jsonl")
    return Trained(config.run.directory, steps[-1] if steps else {})


def evaluate(
    *configurations: Configuration,
    model: str | Path | None = None,
    data: Sequence[str | Path | Mapping[str, Any]] | None = None,
    template: str | None = None,
    samples: int | None = None,
    k: Sequence[int] | None = None,
    max_response_tokens: int | None = None,
    stop_after_correct: int | None = None,
    out: str | Path | None = None,
) -> Evaluated:
    """Samples, judges and stores responses to held-out problems, as `megatron-rapo evaluate` does.

    ```python
    evaluated = megatron_rapo.evaluate(model="runs/one", data=["math500.jsonl"], samples=64, out="evals/one")
    print(evaluated.metrics["math500/t1/pass@1"])
    ```

    Args:
        configurations: of a run, as `train` takes them; none where `model` and `data` are given.
        model: HF directory, checkpoint or run; default: `model.path`.
        data: files, `countdown`, `arithmetic`, or tables as of `evaluate.data`, which is the default.
        template: of the files in `data`: `chat`, the default, or `plain`.
        samples: responses a problem; default: `evaluate.samples`.
        k: of pass@k; default: powers of 2 up to `samples`, or else `evaluate.k`.
        max_response_tokens: default: `rollout.max_response_tokens`.
        stop_after_correct: correct samples at which a problem is done; default: all get all samples.
        out: the evaluation's directory; default: evaluations/MODEL, in the run's directory.

    Raises:
        RapoError: it cannot be as it was asked for, or failed; what was sampled stays. Options have the names
            of the command line there.
    """
    from megatron_rapo.config.write import toml_value
    from megatron_rapo.evaluation.command import Request
    from megatron_rapo.evaluation.command import run as run_evaluation
    from megatron_rapo.evaluation.results import flat

    request = Request(
        configs=_sources(configurations),
        model=None if model is None else Path(model),
        data=None
        if data is None
        else [toml_value(dict(one)) if isinstance(one, Mapping) else str(one) for one in data],
        template=template,
        samples=samples,
        k=k,
        max_response_tokens=max_response_tokens,
        stop_after_correct=stop_after_correct,
        out=None if out is None else Path(out),
    )
    directory, results = run_evaluation(request)
    return Evaluated(directory, flat(results))


def run(config: RunConfig) -> None:
    """Trains the run to its last step, or goes on with it: the ranks of this machine, or this one of a job.

    Raises:
        RapoError: it cannot be as it is configured, or failed.
    """
    from megatron_rapo.folder import own_folder
    from megatron_rapo.launch.environment import RankEnvironment
    from megatron_rapo.record.standing import check_standing

    config = with_date(config, recorded_date(config.run.directory))
    environment = RankEnvironment.read()
    # One process of the job holds the folder: the launcher, or rank 0 where there is none of ours.
    holds = environment is None or environment.rank == 0
    with own_folder(config.run.directory, "run.directory") if holds else nullcontext():
        if done := check_standing(config):
            print(done if holds else "", end="\n" if holds else "")
            return
        from megatron_rapo import preflight  # it takes seconds, which a folder that is taken must not cost

        preflight.check(config)
        _start(config, environment)


def _sources(configurations: Sequence[Configuration]) -> list[Path | Mapping[str, Any]]:
    return [one if isinstance(one, Mapping) else Path(one) for one in configurations]


def _start(config: RunConfig, environment: RankEnvironment | None) -> None:
    from megatron_rapo.launch.stop import requests
    from megatron_rapo.observe.closing import closing_summary

    if environment is None:
        _run_ranks(config)
        print(closing_summary(config.run.directory))
        return
    environment.check_world_size(config.parallel.world_size)
    os.environ.update(environment.variables())
    with requests.noted():
        _train_rank(config)
    if environment.rank == 0:
        print(closing_summary(config.run.directory))


def _run_ranks(config: RunConfig) -> None:
    """The ranks as processes of this machine, started again where that may help."""
    from megatron_rapo.launch.failure import Kind, WorkerFailed
    from megatron_rapo.launch.local import run_local
    from megatron_rapo.observe.heartbeat import describe

    restarted = 0
    while True:
        try:
            run_local(
                _train_rank,
                (config,),
                config.parallel.world_size,
                diagnose=partial(describe, config.run.directory),
                defers_stops=True,
                imports=["megatron_rapo.loop"],
            )
        except WorkerFailed as failed:
            if failed.failure.kind is Kind.USER or restarted == config.run.relaunches:
                raise
            restarted += 1
            print(f"error: {failed}\nstarted again, {restarted} of {config.run.relaunches} times", flush=True)
        else:
            return


def _train_rank(config: RunConfig) -> None:
    """One rank's part. The process that only watches ranks does not import Megatron."""
    from megatron_rapo.folder import writing_to
    from megatron_rapo.loop import train

    with writing_to(config.run.directory, "run.directory"):
        train(config)
