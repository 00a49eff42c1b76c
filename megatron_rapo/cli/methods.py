"""`megatron-rapo methods`: the methods that have a name."""

from __future__ import annotations

import argparse
import inspect
import sys

from megatron_rapo.errors import RapoError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    methods = commands.add_parser(
        "methods",
        help="list the methods that algorithm.method may name",
        description="Lists the methods by name, with paper, what each changes, and what it needs beside "
        "samples and rewards; of one, what its file says: formula, sources, and what is our choice.",
    )
    methods.add_argument("name", nargs="?", metavar="NAME", help="of one method; default: all")
    methods.set_defaults(command=_methods)


def _methods(options: argparse.Namespace) -> int:
    from megatron_rapo.methods.described import described
    from megatron_rapo.methods.named import METHODS

    if options.name is None:
        for one in map(described, METHODS):
            print(f"{one.name:<16}  {one.paper or '-':<10}  {one.changes}")
            if one.needs:
                print(f"{'':<30}needs {', '.join(one.needs)}")
        return 0
    if options.name not in METHODS:
        raise RapoError(
            f"there is no method {options.name!r}; `megatron-rapo methods` lists those that there are"
        )
    print(inspect.getdoc(sys.modules[METHODS[options.name].__module__]))
    return 0
