"""`megatron-rapo samples`: what a run sampled, in the terminal."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rapo.errors import RapoError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    samples = commands.add_parser(
        "samples",
        help="show what a run sampled",
        description="Shows a step's prompts and responses: what was sampled told apart from what was given, "
        "with rewards and facts (docs/samples.md).",
    )
    samples.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    samples.add_argument("--step", type=int, metavar="N", help="default: the newest")
    for kind, what in (("right", "correct"), ("wrong", "wrong"), ("unknown", "could not be judged")):
        samples.add_argument(f"--{kind}", action="store_true", help=f"only responses that are {what}")
    samples.add_argument("--problem", metavar="ID", help="only responses to this problem")
    samples.add_argument("--count", type=int, default=8, metavar="K", help="at most so many; default: 8")
    samples.add_argument("--tokens", action="store_true", help="a line a token, with id and log-prob")
    samples.set_defaults(command=_samples)


def _samples(options: argparse.Namespace) -> int:
    kinds = [kind for kind in ("right", "wrong", "unknown") if getattr(options, kind)]
    if len(kinds) > 1:
        raise RapoError(f"--{' and --'.join(kinds)} exclude each other; give one, or none for all responses")
    if options.count < 1:
        raise RapoError(f"--count {options.count} shows nothing; give 1 or more")
    from megatron_rapo.samples.choosing import choose

    chosen = choose(
        options.run,
        step=options.step,
        kind=kinds[0] if kinds else None,
        problem=options.problem,
        count=options.count,
    )
    from megatron_rapo.data.token_texts import find_token_texts  # late: it takes seconds
    from megatron_rapo.samples.show import show

    show(chosen, find_token_texts([options.run]), tokens=options.tokens)
    return 0
