"""`megatron-rapo report`: a page of training curves and evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    report = commands.add_parser(
        "report",
        help="write a page of training curves and evaluations",
        description="Writes one self-contained HTML page, its figures as PNG and its numbers as CSV and "
        "JSON, and prints a summary. The base is the evaluation of a run's step 0, or else the first one "
        "given.",
    )
    report.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's directory, with all finished evaluations in it, or an evaluation's",
    )
    report.add_argument(
        "--out", type=Path, metavar="DIRECTORY", help="where to write; default: report/ in the first RUN"
    )
    report.add_argument(
        "--control",
        type=Path,
        metavar="EVALUATION",
        help="the base, evaluated anew with another seed, as control of the hard subset; default: the base's "
        "second half of samples, and the first half chooses the subset",
    )
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from megatron_rapo.report.sources import open_sources

    sources = open_sources(options.runs, options.control)  # before what takes seconds to import
    for path in sources.left_out:
        print(f"{path} is not finished, and left out")
    from megatron_rapo.report.build import build_report
    from megatron_rapo.report.write import write_report

    report = build_report(sources)
    print(write_report(report, options.out or options.runs[0] / "report"))
    return 0
