"""`megatron-rapo init`: a small project of one's own, which trains at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rapo.init.project import KINDS, write_project


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    init = commands.add_parser(
        "init",
        help="begin a project with a reward, a method or an environment of one's own",
        description="Writes a small working project: a configuration, your file, a test of it, a README, and "
        "a toy model that trains on a CPU.",
    )
    init.add_argument("folder", type=Path, metavar="FOLDER", help="a new one")
    init.add_argument("--kind", choices=KINDS, required=True, help="what is to be your own")
    init.set_defaults(command=_init)


def _init(options: argparse.Namespace) -> int:
    for path in write_project(options.folder, options.kind):
        print(path)
    configuration = options.folder / "configuration.toml"
    print(f"\nnext: megatron-rapo try {configuration}\n      megatron-rapo train {configuration}")
    return 0
