"""`megatron-rapo tasks`: the tasks of an environment of `verifiers`, as a data file."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rapo.cli.overrides import add_configuration
from megatron_rapo.config import load_config


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    tasks = commands.add_parser(
        "tasks",
        help="write the tasks of a taskset of verifiers as a data file",
        description='Writes the first tasks of the taskset of environment.use = "verifiers" as a JSONL file, '
        "to train and to be evaluated on: each row has `question`, for people, and `task`, which verifiers "
        "plays.",
    )
    tasks.add_argument("--count", type=int, required=True, metavar="N", help="how many tasks")
    tasks.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl", help="the file to write")
    add_configuration(tasks, help="the run's", required=True)
    tasks.set_defaults(command=_tasks)


def _tasks(options: argparse.Namespace) -> int:
    config = load_config(options.configs, options.set)
    from megatron_rapo.environments.verifiers import write_tasks

    written = write_tasks(config, options.count, options.output)
    print(f"{options.output}: {written} tasks")
    return 0
