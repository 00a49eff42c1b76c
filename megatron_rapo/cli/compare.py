"""`megatron-rapo compare`: a model's evaluation against its base's."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    compare = commands.add_parser(
        "compare",
        help="a model's evaluation against its base's",
        description="Frontier, crossover, tests, ledger and hard subset of two stored evaluations.",
    )
    compare.add_argument(
        "base", type=Path, metavar="BASE", help="the base's evaluation, or a run: its newest finished one"
    )
    compare.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a trained model's evaluation, or a run: its newest finished one",
    )
    compare.add_argument(
        "--control",
        type=Path,
        metavar="EVALUATION",
        help="of the base with another seed, to control the hard subset; default: some of BASE's samples",
    )
    compare.add_argument("--k", type=int, nargs="+", help="of the paired tests; default: powers of 2")
    compare.add_argument(
        "--diagnose",
        type=int,
        metavar="N",
        help="also what N correct responses of MODEL are under BASE: loads both models",
    )
    compare.add_argument("--out", type=Path, metavar="DIRECTORY", help="default: comparison/ in MODEL")
    compare.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    from megatron_rapo.evaluation.compare_command import run_compare

    return run_compare(options.base, options.model, options.control, options.k, options.diagnose, options.out)
