"""Where metrics go besides metrics.jsonl: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import os
import secrets
import socket
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole, writing_file


class Logger(Protocol):
    """A place for metrics. All values are finite."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one step."""

    def close(self, failed: bool) -> None:
        """Ends the log; `failed` tells that an error ended the run."""


class TensorBoard:
    """An event file in `<run>/tensorboard`.

    Written here and at once: the library's writer has a thread of its own, which prints what a full disk
    raises there.
    """

    def __init__(self, config: RunConfig, resume_step: int | None) -> None:
        """Steps after `resume_step` (None: all) that an earlier part of the run logged are hidden."""
        folder = config.run.directory / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(self._path.open("xb"))
        purge = 0 if resume_step is None else resume_step + 1
        start = SessionLog(status=SessionLog.SessionStatus.START)
        self._add(Event(file_version="brain.Event:2"))
        self._add(Event(step=purge, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one step, at once."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

    def close(self, failed: bool) -> None:
        """Closes the event file."""
        with writing_file(self._path):
            self._records.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        with writing_file(self._path):
            self._records.write(event.SerializeToString())
            self._records.flush()


class WeightsAndBiases:
    """A run of Weights & Biases; a resumed run goes on in the same one."""

    def __init__(self, config: RunConfig, resume_step: int | None) -> None:
        """Starts or goes on with the run whose id stands in `<run>/wandb_run_id`.

        Raises:
            RapoError: wandb is not installed, or does not start (no login, no network).
        """
        wandb = import_wandb(config.observe.wandb)
        id_file = config.run.directory / "wandb_run_id"
        if resume_step is None or not id_file.exists():
            write_whole(id_file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=config.observe.wandb_project,
                name=config.run.directory.name,
                dir=str(config.run.directory),
                mode=config.observe.wandb,
                id=id_file.read_text(),
                resume="allow",
                config=config.resolved(),
            )
        except wandb.errors.Error as error:
            raise RapoError(
                f'observe.wandb = "{config.observe.wandb}" did not start: {error}; run `wandb login`, '
                'or set observe.wandb = "offline" or "off"'
            ) from error
        # Its own step cannot go back to where a run is resumed, so ours is a metric and the others' axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs one step."""
        self._run.log({"step": step, **metrics})

    def close(self, failed: bool) -> None:
        """Ends the run and waits until it is sent."""
        self._run.finish(exit_code=1 if failed else 0)


def import_wandb(mode: str) -> ModuleType:
    """The library, as `observe.wandb` = `mode` needs it.

    Raises:
        RapoError: it is not installed.
    """
    missing = f'observe.wandb = "{mode}" needs wandb: pip install wandb, or set it to "off"'
    try:
        wandb = importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise RapoError(missing) from error
    if not hasattr(wandb, "init"):  # A folder `wandb` of logs in the working directory imports as empty.
        raise RapoError(missing)
    return wandb
