"""The command line: `megatron-rapo train`, `megatron-rapo certify`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_rapo import __version__
from megatron_rapo.config import Algorithm, RunConfig, load_config
from megatron_rapo.errors import RapoError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 1 after an error, which is printed."""
    options = _parser().parse_args(arguments)
    try:
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a run, or go on with it",
        description="Trains on this machine's processes, or as one rank of a torchrun job.",
    )
    train.add_argument(
        "configs",
        nargs="+",
        type=Path,
        metavar="CONFIG.toml",
        help="configuration; later files overlay earlier ones",
    )
    _add_set(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, layout and memory, then stop",
    )
    train.set_defaults(command=_train)

    certify = commands.add_parser(
        "certify",
        help="prove that loss and gradient do not depend on the layout",
        description="Runs one batch under many layouts, in fp64 and fp32, on four processes of this machine, "
        "and compares loss and whole gradient with plain PyTorch.",
    )
    certify.add_argument(
        "configs",
        nargs="*",
        type=Path,
        metavar="CONFIG.toml",
        help="whose objective and model family to certify; default: RAPO on Qwen2",
    )
    _add_set(certify)
    certify.add_argument("--json", type=Path, metavar="FILE", help="write the certificate there, too")
    certify.set_defaults(command=_certify)
    return parser


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="overrides of single options",
    )


def _certify(options: argparse.Namespace) -> int:
    from megatron_rapo import preflight
    from megatron_rapo.certify.certificate import DEFAULT, as_json, certify, table

    algorithm, architecture = Algorithm(), DEFAULT
    if options.configs:
        config = load_config(options.configs, options.set)
        algorithm, architecture = config.algorithm, preflight.planned_architecture(config)
    elif options.set:
        raise RapoError("--set needs a configuration to override; name one")
    results = certify(algorithm, architecture)
    print(table(results))
    if options.json is not None:
        options.json.write_text(as_json(results))
    return 0 if all(result.passed for result in results) else 1


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.configs, options.set)
    # Imported late: torch and Megatron take seconds, which a wrong option must not cost.
    from megatron_rapo import preflight

    if options.dry_run:
        print(preflight.describe_plan(config))
        return 0
    preflight.check(config)
    _start(config)
    return 0


def _start(config: RunConfig) -> None:
    from megatron_rapo.launch.environment import RankEnvironment
    from megatron_rapo.launch.local import run_local
    from megatron_rapo.observe.closing import closing_summary
    from megatron_rapo.observe.heartbeat import describe

    world_size = config.parallel.world_size
    environment = RankEnvironment.read()
    if environment is None:
        run_local(_train_rank, (config,), world_size, diagnose=partial(describe, config.run.directory))
        print(closing_summary(config.run.directory))
    else:
        environment.check_world_size(world_size)
        _train_rank(config)


def _train_rank(config: RunConfig) -> None:
    """One rank's part. The process that only watches ranks does not import Megatron."""
    from megatron_rapo.train import train

    train(config)
