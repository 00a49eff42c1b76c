"""`megatron-rapo engine`: what starts a server of a kind of engines by hand."""

from __future__ import annotations

import argparse
import sys

from megatron_rapo.engines.kinds import KINDS, find_kind


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    engine = commands.add_parser(
        "engine",
        help="what starts a server of a kind of engines by hand",
        description="Prints the words of a command, one a line, that starts a server as a run needs it: "
        "$(megatron-rapo engine vllm --python /opt/vllm/bin/python) --model MODEL --port 8000",
    )
    engine.add_argument("kind", choices=list(KINDS))
    engine.add_argument(
        "--python",
        metavar="PYTHON",
        default=sys.executable,
        help="interpreter of the environment that the kind is installed in; default: this package's own",
    )
    engine.set_defaults(command=_engine)


def _engine(options: argparse.Namespace) -> int:
    print("\n".join(find_kind(options.kind).command(options.python)))
    return 0
