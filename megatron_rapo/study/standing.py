"""Where each run of a study stands, as its files tell."""

from __future__ import annotations

import enum
import json
import os
import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.config.resuming import changes, options_of
from megatron_rapo.folder import LOCK
from megatron_rapo.observe.step_lines import read_step_lines
from megatron_rapo.record.configurations import read_configurations
from megatron_rapo.study.attempts import read_attempts
from megatron_rapo.study.plan import PlannedRun, is_identity
from megatron_rapo.study.results import Result, refuse_other


class State(enum.Enum):
    """What becomes of a run."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    BEGUN = "begun"
    WAITING = "waiting"


@dataclass(frozen=True)
class Standing:
    """A run and how far it is.

    Attributes:
        step: the last step that is done; None where there is none.
        reward: its mean reward.
        seconds_a_step: the median of its steps: time between a kill and the next start is none of it.
        told: why it failed.
    """

    run: PlannedRun
    state: State
    step: int | None = None
    reward: float | None = None
    seconds_a_step: float | None = None
    told: str = ""


def standings(
    folder: Path, runs: Sequence[PlannedRun], results: Mapping[str, Result], retries: int
) -> list[Standing]:
    """That of each run.

    Raises:
        RapoError: a run's folder is of another configuration than the study has now.
    """
    return [
        _done(run, results[run.name]) if run.name in results else _standing(folder, run, retries)
        for run in runs
    ]


def _done(run: PlannedRun, result: Result) -> Standing:
    """From its result alone: this is asked every few seconds, and metrics of many runs take long to read."""
    rewards = [reward for reward in result.paths.get("reward/mean", ()) if reward is not None]
    return Standing(
        run,
        State.DONE,
        step=result.steps[-1] if result.steps else None,
        reward=rewards[-1] if rewards else None,
    )


def _standing(folder: Path, run: PlannedRun, retries: int) -> Standing:
    check_folder(run)
    lines = read_step_lines(run.directory / "metrics.jsonl")
    rewards = [line["reward/mean"] for line in lines if line.get("reward/mean") is not None]
    trained = [line for line in lines if line["step"] > 0]
    paces = [line["time/step_s"] for line in trained if "time/step_s" in line]
    failures = [attempt for attempt in read_attempts(folder, run.name) if attempt.failed]
    if is_held(run.directory):
        state = State.RUNNING
    elif len(failures) > retries:
        state = State.FAILED
    else:
        state = State.BEGUN if lines else State.WAITING
    return Standing(
        run=run,
        state=state,
        step=lines[-1]["step"] if lines else None,
        reward=rewards[-1] if rewards else None,
        seconds_a_step=statistics.median(paces) if paces else None,
        told=failures[-1].told if failures else "",
    )


def check_folder(run: PlannedRun) -> None:
    """Refuses to go on in a folder that other options made.

    Raises:
        RapoError: it names them.
    """
    configurations = read_configurations(run.directory)
    if not configurations:
        return
    now = json.loads(json.dumps(options_of(run.config)))
    differing = changes(configurations[-1].options, now)
    refuse_other(
        {name: pair for name, pair in differing.items() if is_identity(name)}, run, str(run.directory)
    )


def is_held(directory: Path) -> bool:
    """Whether a command writes to the run's folder now, as its lock tells."""
    try:
        holder = json.loads((directory / LOCK).read_text(encoding="utf-8"))
        if holder["host"] != socket.gethostname():
            return True
        os.kill(int(holder["pid"]), 0)
        return True
    except PermissionError:
        return True  # of another user
    except (OSError, ValueError, KeyError):
        return False  # there is none, or its process was killed
