"""Where a run stands, told and checked before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rapo.checkpoint import files
from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole
from megatron_rapo.record.configurations import check_accepted, check_options
from megatron_rapo.timeline.simulated import refuse_simulated

FINISHED = "finished.json"


def check_standing(config: RunConfig) -> str:
    """Refuses a run that must not go on as it is asked to.

    Returns:
        That the run has finished, for people; empty where there is something to do.

    Raises:
        RapoError: it must not go on at all, is further than `run.steps`, or would go on with other options.
    """
    directory, steps = config.run.directory, config.run.steps
    check_accepted(config)
    refuse_simulated(directory, "choose another run.directory")
    checkpoint = files.newest(directory)
    if checkpoint is None:
        return ""
    if not config.checkpoint.resume:
        raise RapoError(
            f"run.directory = {directory} holds {checkpoint.name}; choose another directory, or set "
            "checkpoint.resume = true to go on from it"
        )
    step = files.step_of(checkpoint)
    if steps < step:
        raise RapoError(
            f"run.steps = {steps}, but the run in {directory} has done {step}; set {step} or more, or choose "
            "another run.directory"
        )
    check_options(directory, config)
    if step == steps == _finished(directory):
        return f"{directory} finished at step {steps}; raise run.steps to go on"
    return ""


def finish(directory: Path, step: int) -> None:
    """Notes that the run has done all its steps and left its model."""
    write_whole(directory / FINISHED, json.dumps({"step": step}) + "\n")


def _finished(directory: Path) -> int | None:
    try:
        return int(json.loads((directory / FINISHED).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # its model is written once more
