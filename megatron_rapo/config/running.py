"""The options of a run's course: where it writes, when it saves, what it logs."""

from __future__ import annotations

from datetime import date as Day
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_rapo.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PathOption,
    PositiveFloat,
    PositiveInt,
    Section,
)


class Run(Section):
    """What this run is called, where it writes, and how long it goes on."""

    directory: PathOption = Field(
        description="Folder of the run: configuration, metrics, checkpoints, final model."
    )
    steps: PositiveInt = Field(description="Rollout batches to train on.")
    seed: int = Field(
        1234,
        ge=0,
        lt=2**31,
        description="Seeds prompt order and sampling; the same seed repeats the run. Generated problems have "
        "a seed of their own, `data.seed`.",
    )
    date: str | None = Field(
        None,
        description="The day, like `2026-11-28`, that chat templates are told where they ask "
        "(`strftime_now`). Default: that of the first start (UTC), which the run and its evaluations keep.",
    )

    code: list[PathOption] = Field(
        [],
        description="Folders with modules of your own, which other options name as `module:name`; they are "
        "looked at in order, before installed packages. Default: those of the configuration's files, of "
        "later files first.",
    )

    relaunches: NonNegativeInt = Field(
        0,
        description="How often the ranks are started again by themselves, from the newest checkpoint, after "
        "one was killed, failed or hung. What the user must mend (an option, data, a reward) ends the run.",
    )

    @field_validator("code")
    @classmethod
    def _from_anywhere(cls, code: list[Path]) -> list[Path]:
        """The resolved copy is read from other working directories, too."""
        return [folder.resolve() for folder in code]

    @model_validator(mode="after")
    def _check(self) -> Run:
        try:
            is_day = self.date is None or Day.fromisoformat(self.date).isoformat() == self.date
        except ValueError:
            is_day = False
        if not is_day:
            raise ValueError(f"date = {self.date!r} is no day; write it like 2026-11-28")
        return self


class Checkpoint(Section):
    """When the run's state is saved, and whether it goes on from an earlier one."""

    every: PositiveInt | None = Field(
        None,
        description="Steps between checkpoints. Default: by `every_minutes`. The last step is saved in any "
        "case, and one after which the run was told to stop.",
    )
    every_minutes: NonNegativeFloat = Field(
        30.0, description="Minutes between checkpoints, at the end of a step; 0: none by time."
    )
    keep: PositiveInt = Field(2, description="Newest checkpoints to keep; older ones are removed.")
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints of steps that this divides are kept for good. Default: none are."
    )
    in_background: bool = Field(
        False,
        description="Training goes on while a checkpoint is written (docs/resume.md). It takes host memory, "
        "a copy of the rank's weights and optimizer.",
    )
    resume: bool = Field(
        True,
        description="Go on from the newest checkpoint in run.directory, if there is one. "
        "false: a directory with checkpoints is an error.",
    )
    stop_grace_s: NonNegativeFloat = Field(
        15.0,
        description="Seconds in which a step must end after SIGINT or SIGTERM, to be saved; else the run "
        "ends without. Schedulers kill after 30 s (docs/resume.md). SIGUSR1 has no such limit.",
    )
    accept_changes: list[str] = Field(
        [],
        exclude=True,
        description="Options that the run may go on with at another value than before, where docs/resume.md "
        "lists them as to be asked for; what `--accept-changes` names. It is not kept with the run.",
    )

    @model_validator(mode="after")
    def _check(self) -> Checkpoint:
        if self.keep_every is not None and (self.every is None or self.keep_every % self.every):
            raise ValueError(
                f"keep_every = {self.keep_every} is no multiple of every = {self.every}: no such step would "
                "be saved; set every to a divisor"
            )
        return self


class Observe(Section):
    """Where metrics go besides metrics.jsonl and TensorBoard, which are always written; hangs."""

    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases.")
    wandb_project: str | None = Field(None, description="Project in Weights & Biases.")
    peak_tflops: PositiveFloat | None = Field(
        None,
        description="Dense peak of one rank's device in `model.dtype`, in TFLOP/s, which `throughput/mfu` is "
        "a share of. Default: NVIDIA's figure for the GPU in bfloat16; on others no share is told.",
    )
    profile_steps: list[PositiveInt] = Field(
        [],
        description="Steps that PyTorch's profiler records into `<run>/profile`, operator by operator; they "
        "take longer.",
    )
    profile_ranks: list[NonNegativeInt] = Field([0], description="Ranks that it records them on.")
    hang_factor: float = Field(
        5.0,
        gt=1,
        description="A rank hangs once it is in a phase for this many times the longest that the phase took "
        "it of late (docs/reliability.md). One that it is in for the first time has parallel.timeout_s.",
    )
    hang_least_s: PositiveFloat = Field(
        60.0,
        description="Seconds within which no phase counts as a hang; where engines are waited for, beyond "
        "rollout.request_timeout_s, or rollout.startup_timeout_s where one may be started anew.",
    )
    hang_action: Literal["end", "tell"] = Field(
        "end",
        description="What then happens: the report of where all ranks are and the end of the job, which "
        "`run.relaunches` may start again; or the report alone, once.",
    )
    samples_every: NonNegativeInt = Field(
        1,
        description="Steps between those whose samples are kept in `<run>/samples` (docs/samples.md); "
        "0: none.",
    )
    samples_keep: PositiveInt | None = Field(
        None,
        description="Newest of these steps to keep; the samples of older ones are removed. Default: all.",
    )

    def without_effect(self) -> dict[str, str]:
        inert = {}
        if self.wandb == "off":
            inert["wandb_project"] = 'wandb is "off"'
        if not self.profile_steps:
            inert["profile_ranks"] = "profile_steps = [] profiles nothing"
        if not self.samples_every:
            inert["samples_keep"] = "samples_every = 0 keeps none"
        return inert

    @model_validator(mode="after")
    def _check(self) -> Observe:
        if self.wandb != "off" and self.wandb_project is None:
            raise ValueError(f'wandb = "{self.wandb}" needs wandb_project; set it')
        return self
