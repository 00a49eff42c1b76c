"""`megatron-rapo try`: one problem through template, engine, environment and reward."""

from __future__ import annotations

import argparse

from megatron_rapo.cli.overrides import add_configuration
from megatron_rapo.config import load_config
from megatron_rapo.config.date import with_date
from megatron_rapo.errors import RapoError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "try",
        help="see what becomes of one problem, without training",
        description="Takes one problem through template, engine, environment and reward, and prints tokens, "
        "rewards and times. The engine serves model.path; the run's directory stays as it is. Ends with "
        "status 1 where a reward is unknown.",
    )
    add_configuration(command, help="a run's configuration", required=True)
    command.add_argument("--problem", metavar="N|ID", help="row or id of the problem; default: the first")
    command.add_argument("--responses", type=int, default=2, metavar="K", help="default: 2")
    command.set_defaults(command=_try)


def _try(options: argparse.Namespace) -> int:
    config = with_date(load_config(options.configs, options.set), None)
    if options.responses < 1:
        raise RapoError(f"--responses {options.responses}: ask for at least one")
    if not config.model.path.is_dir():
        raise RapoError(f"model directory {config.model.path} does not exist; download the model there")
    from megatron_rapo.launch.stop import requests
    from megatron_rapo.trial.show import show
    from megatron_rapo.trial.take import take

    with requests.noted():
        taken = take(config, options.problem, options.responses)
    print("\n".join(show(taken)))
    return 0 if taken.known else 1
