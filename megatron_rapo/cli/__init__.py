"""The command line, `megatron-rapo COMMAND`: a module for each command.

Each adds its parser, and imports what it needs only when it runs: torch and Megatron take seconds, which
a wrong option must not cost.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron_rapo import __version__
from megatron_rapo.cli import (
    calibrate,
    certify,
    compare,
    convert,
    doctor,
    engine,
    evaluate,
    init,
    methods,
    plan,
    report,
    samples,
    study,
    tasks,
    trace,
    train,
    try_,
)
from megatron_rapo.cli.overrides import take_configuration
from megatron_rapo.errors import RapoError

COMMANDS = (
    init,
    methods,
    try_,
    plan,
    train,
    certify,
    evaluate,
    compare,
    report,
    study,
    samples,
    trace,
    doctor,
    calibrate,
    engine,
    convert,
    tasks,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 1 after an error, which is printed, 2 without one."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if "command" not in options:
        options.of.print_help(sys.stderr)
        return 2
    try:
        take_configuration(options)
        return options.command(options)
    except RapoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-rapo", description="RAPO at scale: RL with verifiable rewards on Megatron-Core."
    )
    parser.add_argument("--version", action="version", version=f"megatron-rapo {__version__}")
    parser.set_defaults(of=parser)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
