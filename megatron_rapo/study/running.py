"""All runs of a study made: here, as SLURM arrays, or with further seeds until the answer is narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import own_folder
from megatron_rapo.study import slurm
from megatron_rapo.study.added_seeds import (
    FIRST_LOOK,
    Look,
    enough,
    out_of_reach,
    read_looks,
    write_looks,
)
from megatron_rapo.study.analysis import analyse
from megatron_rapo.study.attempts import forget_failures
from megatron_rapo.study.crossed import Crossed
from megatron_rapo.study.local import run_all
from megatron_rapo.study.opened import Opened
from megatron_rapo.study.plan import PlannedRun
from megatron_rapo.study.results import Result, file_of, read_result
from megatron_rapo.study.stages import Stages
from megatron_rapo.study.standing import Standing
from megatron_rapo.study.table import Shown

ADDED = "a seed is added"


def run(opened: Opened, cores: int, *, retry_failed: bool = False) -> bool:
    """Makes all runs that are not there, the search's first.

    Args:
        opened: the study.
        cores: that may be busy at a time.
        retry_failed: also those that failed for good.

    Returns:
        Whether it came to its end, and was not stopped.

    Raises:
        RapoError: another command runs the study, or a run cannot be as it is planned.
    """
    with own_folder(opened.folder, "the study's folder"):
        if retry_failed:
            for planned in opened.plan().runs:
                forget_failures(opened.folder, planned.name)
        while True:
            stages = opened.plan()
            todo = opened.todo(stages)
            if not todo:
                break
            if not _run(opened, stages, todo, cores):
                return False
    if not stages.searched:
        raise RapoError(
            "the search is not through, and other commands make what is left of it; run the study again when "
            "they have ended (--status tells)"
        )
    return True


def submit(opened: Opened, cores: int, *, dry_run: bool) -> list[Path]:
    """Submits what can be made now as SLURM arrays; their scripts.

    Raises:
        RapoError: SLURM refuses, or a run takes several nodes.
    """
    todo = opened.todo(opened.plan())
    if not todo:
        return []
    return slurm.submit(opened.file, todo, opened.folder, cores, opened.study.sbatch, dry_run=dry_run)


def run_until_narrow(opened: Opened, cores: int, target: float, core_hours: float) -> bool:
    """Adds seeds until the primary contrast's interval is so narrow, or can or may not become so.

    Args:
        opened: the study.
        cores: that may be busy at a time.
        target: width of the interval.
        core_hours: of all runs of the study together.

    Returns:
        Whether it came to its end, and was not stopped.

    Raises:
        RapoError: the primary contrast has no interval, or as of `run`.
    """
    while run(opened, cores):
        stages = opened.plan()
        told = analyse(opened.study, stages, opened.folder).primary
        if told.difference is None:
            raise RapoError(f"--until-interval: the primary contrast has no interval, since {told.why}")
        looks = [
            look for look in read_looks(opened.folder) if look.seeds < told.difference.seeds or look.added
        ]
        look = _look(stages, looks, told.difference, target, core_hours)
        write_looks(opened.folder, [*looks, look])
        print(f"{look.seeds} seeds: an interval of width {look.width:.4f}, asked {target:g}: {look.decision}")
        if not look.added:
            return True
    return False


def _look(stages: Stages, before: Sequence[Look], found: Crossed, target: float, core_hours: float) -> Look:
    seeds = {run.seed for run in stages.main}
    used = sum(result.core_hours for result in stages.results.values())
    another = used / len(seeds)
    seen = [(look.seeds, look.width) for look in before if look.target == target]
    if enough([*seen, (found.seeds, found.width)], target):
        decision = "narrow enough"
    elif before and before[-1].seeds >= found.seeds:
        decision = "stopped: the seed that was added last came to no pair of finished runs"
    elif found.seeds >= FIRST_LOOK and out_of_reach(found, target):
        decision = "stopped: problems alone keep it wider; evaluate more of them"
    elif used + another > core_hours:
        decision = (
            f"stopped: of {core_hours:g} core-hours {used:.2f} are spent, and a seed takes {another:.2f}"
        )
    else:
        decision = ADDED
    added = [max(seeds) + 1] if decision == ADDED else []
    return Look(found.seeds, target, found.mean, found.low, found.high, decision, added)


def _run(opened: Opened, stages: Stages, todo: Sequence[PlannedRun], cores: int) -> bool:
    """Those of one stage, with the table of where they stand."""
    results = dict(stages.results)

    def ask() -> tuple[Sequence[Standing], Mapping[str, Result]]:
        for one in todo:
            file = file_of(opened.folder, one.name)
            if one.name not in results and file.exists():
                results[one.name] = read_result(file)
        return opened.standings(Stages(**{**vars(stages), "results": results})), results

    with Shown(ask) as shown:
        return run_all(todo, opened.folder, cores, opened.study.retries, shown.show)
