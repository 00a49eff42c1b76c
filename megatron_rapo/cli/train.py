"""`megatron-rapo train`: a run on this machine, as a rank of a job, or submitted to SLURM."""

from __future__ import annotations

import argparse
import json

from megatron_rapo.cli.overrides import add_configuration
from megatron_rapo.config import load_config
from megatron_rapo.config.date import recorded_date, with_date


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
    if options.dry_run:
        from megatron_rapo import preflight

        print(preflight.describe_plan(with_date(config, recorded_date(config.run.directory))))
        return 0
    from megatron_rapo.api import run

    run(config)
    return 0
