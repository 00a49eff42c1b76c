"""Where a run's checkpoints lie, as far as their names tell: for what must not load Megatron first."""

from __future__ import annotations

from pathlib import Path

FOLDER = "checkpoints"
RECORD = "run.json"  # it makes a checkpoint of a folder


def folder_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step that it was saved after."""
    return int(checkpoint.name.removeprefix("step_"))


def complete(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in the folder, oldest first."""
    found = [path.parent for path in checkpoints.glob(f"step_*/{RECORD}")]
    named = [
        path for path in found if path.name.removeprefix("step_").isdecimal()
    ]  # a copy may have any name
    return sorted(named, key=step_of)


def newest(run_directory: Path) -> Path | None:
    """A run's last complete checkpoint; None where there is none."""
    found = complete(run_directory / FOLDER)
    return found[-1] if found else None


def how_to_go_on(run_directory: Path) -> str:
    """What is there to go on from, for people."""
    checkpoint = newest(run_directory)
    if checkpoint is None:
        return "there is no checkpoint yet, so the same command begins anew"
    return f"the newest checkpoint is {checkpoint}, and the same command goes on from there"
