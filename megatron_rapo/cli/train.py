"""`megatron-rapo train`: a run on this machine, as a rank of a job, or submitted to SLURM."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from megatron_rapo.cli.overrides import add_configuration
from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.date import recorded_date, with_date

if TYPE_CHECKING:
    from megatron_rapo.launch.environment import RankEnvironment


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    train = commands.add_parser(
        "train",
        help="train a run, or go on with it",
        description="Trains on this machine's processes, or as one rank of a torchrun or srun job.",
    )
    add_configuration(train, help="configuration; later files overlay earlier ones", required=True)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, layout and memory, then stop",
    )
    train.add_argument(
        "--accept-changes",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY",
        help="go on with another value of these options than before (docs/resume.md)",
    )
    train.add_argument(
        "--slurm",
        action="store_true",
        help="submit the run as a SLURM job, laid out by [slurm]; with --dry-run, only print its plan",
    )
    train.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> int:
    if options.accept_changes:  # as a setting, so that a SLURM job has it, too
        options.set = [*options.set, f"checkpoint.accept_changes={json.dumps(options.accept_changes)}"]
    config = load_config(options.configs, options.set)
    if options.slurm:
        from megatron_rapo.launch.slurm import submit

        return submit(config, options.configs, options.set, dry_run=options.dry_run)
    config = with_date(config, recorded_date(config.run.directory))
    if options.dry_run:
        from megatron_rapo import preflight

        print(preflight.describe_plan(config))
        return 0
    from megatron_rapo.folder import own_folder
    from megatron_rapo.launch.environment import RankEnvironment
    from megatron_rapo.record.standing import check_standing

    environment = RankEnvironment.read()
    # One process of the job holds the folder: the launcher, or rank 0 where there is none of ours.
    holds = environment is None or environment.rank == 0
    with own_folder(config.run.directory, "run.directory") if holds else nullcontext():
        if done := check_standing(config):
            print(done if holds else "", end="\n" if holds else "")
            return 0
        from megatron_rapo import preflight  # it takes seconds, which a folder that is taken must not cost

        preflight.check(config)
        _start(config, environment)
    return 0


def _start(config: RunConfig, environment: RankEnvironment | None) -> None:
    from megatron_rapo.launch.local import run_local
    from megatron_rapo.launch.stop import requests
    from megatron_rapo.observe.closing import closing_summary
    from megatron_rapo.observe.heartbeat import describe

    world_size = config.parallel.world_size
    if environment is None:
        run_local(
            _train_rank,
            (config,),
            world_size,
            diagnose=partial(describe, config.run.directory),
            defers_stops=True,
        )
        print(closing_summary(config.run.directory))
        return
    environment.check_world_size(world_size)
    os.environ.update(environment.variables())
    with requests.noted():
        _train_rank(config)
    if environment.rank == 0:
        print(closing_summary(config.run.directory))


def _train_rank(config: RunConfig) -> None:
    """One rank's part. The process that only watches ranks does not import Megatron."""
    from megatron_rapo.folder import writing_to
    from megatron_rapo.loop import train

    with writing_to(config.run.directory, "run.directory"):
        train(config)
