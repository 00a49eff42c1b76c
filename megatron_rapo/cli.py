"""The command line, `megatron-rapo COMMAND`: what is asked, and which part of the package does it."""

from __future__ import annotations

import argparse
import os
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
        description="Trains on this machine's processes, or as one rank of a torchrun or srun job.",
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
    train.add_argument(
        "--slurm",
        action="store_true",
        help="submit the run as a SLURM job, laid out by [slurm]; with --dry-run, only print its plan",
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
    _add_evaluate(
        commands.add_parser(
            "evaluate",
            help="pass@k of a model on held-out problems",
            description="Samples N responses a problem, verifies and stores them. The same command goes on "
            "after an interruption, and to a larger N.",
        )
    )
    _add_compare(
        commands.add_parser(
            "compare",
            help="a model's evaluation against its base's",
            description="Frontier, crossover, tests, ledger and hard subset of two stored evaluations.",
        )
    )
    _add_doctor(commands.add_parser("doctor", help="find out what is wrong with a run's engines"))
    _add_convert(commands.add_parser("convert", help="HF models into Megatron checkpoints, and back"))
    _add_report(
        commands.add_parser(
            "report",
            help="write a page of training curves and evaluations",
            description="Writes one self-contained HTML page, its figures as PNG and its numbers as CSV and "
            "JSON, and prints a summary. The base is the evaluation of a run's step 0, or else the first one "
            "given.",
        )
    )
    return parser


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("base", type=Path, metavar="BASE", help="the base's evaluation")
    compare.add_argument("model", type=Path, metavar="MODEL", help="a trained model's evaluation")
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


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "configs",
        nargs="*",
        type=Path,
        metavar="CONFIG.toml",
        help="a run's configuration; --model and --data may also stand without one",
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
    _add_set(evaluate)
    evaluate.set_defaults(command=_evaluate)


def _add_convert(convert: argparse.ArgumentParser) -> None:
    directions = convert.add_subparsers(required=True, metavar="DIRECTION")
    to_hf = directions.add_parser("to-hf", help="a Megatron checkpoint, such as a run's, into a HF model")
    to_hf.add_argument("source", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a run's directory")
    to_hf.add_argument(
        "--model",
        type=Path,
        metavar="HF_DIRECTORY",
        help="whose config.json and tokenizer are carried over; default: those that the checkpoint tells",
    )
    to_hf.set_defaults(command=_convert_to_hf)
    to_megatron = directions.add_parser("to-megatron", help="a HF model into a Megatron checkpoint")
    to_megatron.add_argument("source", type=Path, metavar="HF_DIRECTORY", help="the model")
    to_megatron.set_defaults(command=_convert_to_megatron)
    for direction in (to_hf, to_megatron):
        direction.add_argument(
            "destination", type=Path, metavar="DESTINATION", help="folder to make; must not exist"
        )


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's directory, with all evaluations in it, or an evaluation's",
    )
    report.add_argument(
        "--out", type=Path, metavar="DIRECTORY", help="where to write; default: report/ in the first RUN"
    )
    report.add_argument(
        "--control",
        type=Path,
        metavar="EVALUATION",
        help="the base, evaluated anew with another seed, as control of the hard subset; default: the base's "
        "samples of odd numbers, and those of even ones choose the subset",
    )
    report.set_defaults(command=_report)


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    doctor.description = (
        "Attributes a difference of engines and trainer by probing fixed prompts, at the run's layout and "
        "with its engines. They must serve no run meanwhile, and have the run's newest weights afterwards. "
        "Ends with status 1 where a cause is found."
    )
    doctor.add_argument(
        "--mismatch", action="store_true", required=True, help="why log-probs of engines and trainer differ"
    )
    doctor.add_argument(
        "configs",
        nargs="+",
        type=Path,
        metavar="CONFIG.toml",
        help="the run's, or <run.directory>/config.toml",
    )
    _add_set(doctor)
    doctor.set_defaults(command=_doctor)


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


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_rapo.evaluate.command import Request, run

    return run(
        Request(
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
    )


def _compare(options: argparse.Namespace) -> int:
    from megatron_rapo.evaluate.command import run_compare

    return run_compare(options.base, options.model, options.control, options.k, options.diagnose, options.out)


def _doctor(options: argparse.Namespace) -> int:
    config = load_config(options.configs, options.set)
    from megatron_rapo import preflight
    from megatron_rapo.doctor.run import find_mismatch
    from megatron_rapo.doctor.table import table
    from megatron_rapo.launch.environment import RankEnvironment

    preflight.check(config)
    findings = find_mismatch(config)
    environment = RankEnvironment.read()
    if environment is None or environment.rank == 0:
        print(table(findings))
    return int(any(finding.verdict != "ok" for finding in findings))


def _convert_to_hf(options: argparse.Namespace) -> int:
    from megatron_rapo.convert.to_hf import convert_to_hf

    convert_to_hf(options.source, options.destination, options.model)
    return 0


def _convert_to_megatron(options: argparse.Namespace) -> int:
    from megatron_rapo.convert.to_megatron import convert_to_megatron

    convert_to_megatron(options.source, options.destination)
    return 0


def _report(options: argparse.Namespace) -> int:
    from megatron_rapo.report.build import build_report
    from megatron_rapo.report.write import write_report

    report = build_report(options.runs, options.control)
    print(write_report(report, options.out or options.runs[0] / "report"))
    return 0


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.configs, options.set)
    # Imported late: torch and Megatron take seconds, which a wrong option must not cost.
    from megatron_rapo import preflight

    if options.slurm:
        from megatron_rapo.launch.slurm import submit

        return submit(config, options.configs, options.set, dry_run=options.dry_run)
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
        return
    environment.check_world_size(world_size)
    os.environ.update(environment.variables())
    _train_rank(config)
    if environment.rank == 0:
        print(closing_summary(config.run.directory))


def _train_rank(config: RunConfig) -> None:
    """One rank's part. The process that only watches ranks does not import Megatron."""
    from megatron_rapo.train import train

    train(config)
