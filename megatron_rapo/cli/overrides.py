"""The arguments that all commands with a configuration share: its files, and settings over them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from megatron_rapo.errors import RapoError

_SETTING = re.compile(r"[\w-]+(\.[\w-]+)*\s*=", re.ASCII)


def add_configuration(command: argparse.ArgumentParser, *, help: str, required: bool) -> None:
    """`CONFIG.toml…` and `--set`. `take_configuration` sorts them out once they are parsed."""
    command.add_argument("configs", nargs="*", type=Path, metavar="CONFIG.toml", help=help)
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="overrides of single options",
    )
    command.set_defaults(needs_configuration=command.prog if required else None)


def take_configuration(options: argparse.Namespace) -> None:
    """Takes files behind `--set` or `--data`, which take all words that follow, for configurations.

    Raises:
        RapoError: the command needs a configuration, and there is none.
    """
    if not hasattr(options, "needs_configuration"):
        return
    files = [word for word in options.set if _is_file(word)]
    options.set = [word for word in options.set if word not in files]
    if data := getattr(options, "data", None):
        files += [word for word in data if word.endswith(".toml")]
        options.data = [word for word in data if word not in files]
    options.configs = [*options.configs, *map(Path, files)]
    if options.needs_configuration and not options.configs:
        raise RapoError(
            f"{options.needs_configuration} needs a configuration; name a TOML file, such as "
            "examples/configs/demo.toml"
        )


def _is_file(word: str) -> bool:
    return not _SETTING.match(word) and (word.endswith(".toml") or Path(word).is_file())
