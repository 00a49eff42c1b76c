"""`megatron-rapo study`: a question, the runs that answer it, and the answer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_rapo.errors import RapoError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    study = commands.add_parser(
        "study",
        help="run a grid of runs and write its answer",
        description="Makes all runs of a study file, here or as SLURM arrays, and writes one page with the "
        "answer and its interval. The same command goes on after an interruption or a change of the grid.",
    )
    study.add_argument("file", type=Path, metavar="STUDY.toml", help="the study (docs/studies.md)")
    way = study.add_mutually_exclusive_group()
    way.add_argument("--dry-run", action="store_true", help="print the expanded plan and its cost, then stop")
    way.add_argument("--status", action="store_true", help="print where each run stands, then stop")
    way.add_argument("--report", action="store_true", help="only analyse what is there, and write the page")
    way.add_argument("--only", metavar="RUN", help="make this one run, and nothing else")
    way.add_argument(
        "--until-interval",
        type=float,
        metavar="WIDTH",
        help="add seeds until the primary contrast's interval is so narrow, or --core-hours are spent",
    )
    study.add_argument("--core-hours", type=float, metavar="H", help="that --until-interval may spend in all")
    study.add_argument(
        "--cores",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="that runs may keep busy together; default: those of this machine",
    )
    study.add_argument(
        "--retry-failed", action="store_true", help="start runs that failed for good once more"
    )
    study.add_argument(
        "--slurm",
        action="store_true",
        help="submit as SLURM arrays; with --dry-run, only write their scripts",
    )
    study.set_defaults(command=_study)


def _study(options: argparse.Namespace) -> int:
    _check(options)
    from megatron_rapo.study import command, running
    from megatron_rapo.study.opened import Opened

    opened = Opened.at(options.file)
    if options.slurm:
        scripts = running.submit(opened, options.cores, dry_run=options.dry_run)
        print("\n".join(map(str, scripts)) or "nothing is left to run; --report writes the answer")
        return 0
    if options.dry_run or options.status:
        print(command.show_plan(opened, options.cores) if options.dry_run else command.show_status(opened))
        return 0
    if options.only is not None:
        return command.make_one(opened, options.only)
    if options.report:
        print(command.report(opened))
        return 0
    if options.until_interval is not None:
        done = running.run_until_narrow(opened, options.cores, options.until_interval, options.core_hours)
    else:
        done = running.run(opened, options.cores, retry_failed=options.retry_failed)
    if not done:
        return 130
    print(command.report(opened))
    return 0


def _check(options: argparse.Namespace) -> None:
    if options.cores < 1:
        raise RapoError(f"--cores {options.cores} runs nothing; give at least 1")
    if options.until_interval is not None and (not options.until_interval > 0 or options.core_hours is None):
        raise RapoError(
            f"--until-interval {options.until_interval:g} needs a width above 0, and --core-hours to "
            "spend at most; give both"
        )
    if options.core_hours is not None and options.until_interval is None:
        raise RapoError(
            f"--core-hours {options.core_hours:g} has no effect without --until-interval; remove it"
        )
    if options.slurm and (options.status or options.report or options.only or options.until_interval):
        raise RapoError("--slurm submits runs; leave out --status, --report, --only and --until-interval")
    if options.retry_failed and (
        options.dry_run or options.status or options.report or options.only or options.slurm
    ):
        raise RapoError("--retry-failed is for runs that are made here; leave out the other options")
