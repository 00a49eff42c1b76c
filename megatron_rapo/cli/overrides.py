"""The option that all commands with a configuration share."""

from __future__ import annotations

import argparse


def add_set(command: argparse.ArgumentParser) -> None:
    """`--set`, for commands that read a configuration."""
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="overrides of single options",
    )
