"""The report's files: page, figures, numbers, summary."""

from __future__ import annotations

from pathlib import Path

from megatron_rapo.folder import own_folder
from megatron_rapo.report.contents import Report
from megatron_rapo.report.drawing import save_png
from megatron_rapo.report.numbers import write_numbers
from megatron_rapo.report.page import render
from megatron_rapo.report.schedule import save_schedule
from megatron_rapo.report.summary import summary_text


def write_report(report: Report, directory: Path) -> str:
    """Writes `report.html`, `figures/*.png`, `numbers/` and `summary.txt`; those of an earlier report go.

    Returns:
        The summary, for the terminal: what stands in `summary.txt`, and where the files are.
    """
    with own_folder(directory, "--out"):
        return _write(report, directory)


def _write(report: Report, directory: Path) -> str:
    figures = directory / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for plot in report.plots():
        save_png(plot, figures / f"{plot.name}.png")
    for timeline in report.timelines:
        save_schedule(timeline.schedule, figures / f"{timeline.schedule.name}.png")
    write_numbers(report, directory / "numbers")
    summary = summary_text(report)
    (directory / "summary.txt").write_text(summary, encoding="utf-8")
    page = directory / "report.html"
    page.write_text(render(report), encoding="utf-8")
    files = [f"{page}  the page", f"{figures}  its figures", f"{directory / 'numbers'}  its numbers"]
    return summary + "\n" + "\n".join(files)
