"""`megatron-rapo evaluate`: pass@k of a model on held-out problems."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rapo.cli.overrides import add_configuration


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="pass@k of a model on held-out problems",
        description="Samples N responses a problem, verifies and stores them. The same command goes on "
        "after an interruption, and to a larger N.",
    )
    add_configuration(
        evaluate,
        help="a run's configuration; --model and --data may also stand without one",
        required=False,
    )
    evaluate.add_argument(
        "--model", type=Path, metavar="PATH", help="HF directory, checkpoint or run; default: model.path"
    )
    evaluate.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="SET",
        help=".jsonl or .parquet files, countdown, arithmetic, or TOML tables; default: evaluate.data",
    )
    evaluate.add_argument("--template", choices=["chat", "plain"], help="of --data's files; default: chat")
    evaluate.add_argument("--samples", type=int, metavar="N", help="responses a problem: evaluate.samples")
    evaluate.add_argument(
        "--k", type=int, nargs="+", help="evaluate.k; beside --samples: powers of 2 up to N"
    )
    evaluate.add_argument(
        "--max-response-tokens", type=int, metavar="TOKENS", help="rollout.max_response_tokens"
    )
    evaluate.add_argument(
        "--stop-after-correct",
        type=int,
        metavar="R",
        help="adaptive budget: a problem is done with R correct samples (16, say), or with N",
    )
    evaluate.add_argument(
        "--out", type=Path, metavar="DIRECTORY", help="default: evaluations/MODEL, in the run's directory"
    )
    evaluate.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_rapo.evaluation.command import Request, run
    from megatron_rapo.launch.stop import requests

    request = Request(
        configs=options.configs,
        settings=options.set,
        model=options.model,
        data=options.data,
        template=options.template,
        samples=options.samples,
        k=options.k,
        max_response_tokens=options.max_response_tokens,
        stop_after_correct=options.stop_after_correct,
        out=options.out,
    )
    requests.last_words = _tell_stop
    with requests.noted():
        run(request)
    return 0


def _tell_stop(_: str) -> None:
    print("stopped: what was sampled stays, and the same command goes on", flush=True)
