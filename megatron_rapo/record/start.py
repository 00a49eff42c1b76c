"""A start of a run in its directory: what it may go on with, and what it leaves there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_rapo.checkpoint import files
from megatron_rapo.config import RunConfig
from megatron_rapo.config.write import to_toml
from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole
from megatron_rapo.guards import findings
from megatron_rapo.observe.step_lines import read_step_lines
from megatron_rapo.record import configurations, identity
from megatron_rapo.record.configurations import record_configuration
from megatron_rapo.record.identity import Identity
from megatron_rapo.record.versions import record_versions
from megatron_rapo.samples.store import FOLDER, drop_after

METRICS = "metrics.jsonl"
EARLIER = "earlier"
# What a start that left no checkpoint has told; a new one begins anew.
RECORDS = (
    *(METRICS, "published.jsonl", "versions.jsonl", "config.toml", configurations.FILE, identity.FILE),
    *("tensorboard", "evaluations", FOLDER, findings.FILE),
)


def check_identity(config: RunConfig, now: Identity) -> None:
    """Refuses to go on from a checkpoint with other data or weights than the run began with.

    Raises:
        RapoError: it names what differs.
    """
    directory = config.run.directory
    before = Identity.read(directory)
    if before is None or files.newest(directory) is None:
        return
    if any(option.startswith("evaluate.") for option in config.checkpoint.accept_changes):
        before = replace(before, evaluation={})  # these were asked to be others
    if found := before.differences(now):
        raise RapoError(
            f"run.directory = {directory} was begun with {', '.join(found)}; it goes on with the same alone: "
            "restore that, or choose another run.directory"
        )


def begin(config: RunConfig, now: Identity, versions: Mapping[str, str], step: int | None) -> list[str]:
    """Leaves in the run's directory what it goes on with.

    Args:
        config: of the run.
        now: what it loaded.
        versions: of its software.
        step: that it goes on after; None where it begins.

    Returns:
        What there is to tell of it, a line each.
    """
    directory = config.run.directory
    lines = _begins(directory) if step is None else _goes_on(config, step)
    drop_after(directory, step or 0)
    before = None if step is None else Identity.read(directory)
    if before is not None:  # also what is not in use this time
        contents, evaluation = before.contents | now.contents, before.evaluation | now.evaluation
        now = replace(now, contents=contents, evaluation=evaluation)
    now.write(directory)
    changed = [
        record_configuration(directory, step or 0, config),
        record_versions(directory, step, versions),
    ]
    write_whole(directory / "config.toml", to_toml(config))
    return [*lines, *(f"  {line}" for line in changed if line)]


def _goes_on(config: RunConfig, step: int) -> list[str]:
    directory = config.run.directory
    logged = read_step_lines(directory / METRICS)
    last = logged[-1]["step"] if logged else step
    lost = f"; steps {step + 1} to {last} were not saved, and come again" if last > step else ""
    return [f"going on after step {step} of {config.run.steps}, from {files.newest(directory)}{lost}"]


def _begins(directory: Path) -> list[str]:
    """Keeps what an earlier start has left that saved nothing."""
    logged = read_step_lines(directory / METRICS)
    if not logged:
        return []
    kept = next(
        path for number in range(1, 10_000) if not (path := directory / EARLIER / f"{number:03d}").exists()
    )
    kept.mkdir(parents=True)
    for name in RECORDS:
        if (directory / name).exists():
            (directory / name).rename(kept / name)
    done = logged[-1]["step"]
    return [f"an earlier start came to step {done} without a checkpoint: its records are in {kept}"]
