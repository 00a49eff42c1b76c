"""The options of a run's course: where it writes, when it saves and evaluates, what it logs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_rapo.config.data import Data
from megatron_rapo.config.section import PathOption, PositiveInt, Section


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
        description="Seeds prompt order, generated tasks and sampling; the same seed repeats the run.",
    )


class Checkpoint(Section):
    """When the run's state is saved, and whether it goes on from an earlier one."""

    every: PositiveInt | None = Field(
        None, description="Steps between checkpoints. Default: only after the last step."
    )
    keep: PositiveInt = Field(2, description="Newest checkpoints to keep; older ones are removed.")
    resume: bool = Field(
        True,
        description="Go on from the newest checkpoint in run.directory, if there is one. "
        "false: a directory with checkpoints is an error.",
    )


class Evaluate(Section):
    """pass@k on held-out problems, before the first step and after the last; nothing without this table."""

    problems: PositiveInt = Field(64, description="Held-out problems.")
    samples: PositiveInt = Field(16, description="N: responses a problem.")
    k: list[PositiveInt] = Field([1, 4, 16], description="The k of pass@k, each at most `samples`.")
    every: PositiveInt | None = Field(
        None, description="Also after every so many steps. Default: only before the first and after the last."
    )
    data: Data | None = Field(
        None,
        description="Where the problems come from. Default: the test split of a generated task; "
        "training from a file needs one here.",
    )

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if not self.k or max(self.k) > self.samples:
            raise ValueError(f"k = {self.k} needs values from 1 to samples = {self.samples}")
        return self


class Observe(Section):
    """Where metrics go besides metrics.jsonl and TensorBoard, which are always written."""

    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases.")
    wandb_project: str | None = Field(None, description="Project in Weights & Biases.")

    def without_effect(self) -> dict[str, str]:
        return {"wandb_project": 'wandb is "off"'} if self.wandb == "off" else {}

    @model_validator(mode="after")
    def _check(self) -> Observe:
        if self.wandb != "off" and self.wandb_project is None:
            raise ValueError(f'wandb = "{self.wandb}" needs wandb_project; set it')
        return self
