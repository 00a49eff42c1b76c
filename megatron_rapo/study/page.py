"""A study's report: one page, its figures as PNG, its numbers as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from megatron_rapo.folder import own_folder
from megatron_rapo.report.drawing import save_png
from megatron_rapo.report.figures import PageFigure, figure
from megatron_rapo.report.page import Section, render_page
from megatron_rapo.study.analysis import Analysis
from megatron_rapo.study.answer import answer, changes, sentence
from megatron_rapo.study.diagnosed import mean_by_kind
from megatron_rapo.study.figures import plots
from megatron_rapo.study.outcomes import judged, mean_outcome
from megatron_rapo.study.results import Result
from megatron_rapo.study.schema import Outcome

FOLDER = "report"
SECTIONS = (
    Section("study_answer", "Answer"),
    Section("study_contrasts", "Contrasts"),
    Section("study_figures", "Figures"),
    Section("study_arms", "Arms"),
    Section("study_runs", "Runs and cost"),
)


@dataclass(frozen=True)
class ShownRun:
    """A finished run, with where its folder is from the page, and its outcome."""

    result: Result
    link: str
    outcome: str


@dataclass(frozen=True)
class DiagnosedArm:
    """Correct responses of all seeds: how many, means over seeds, and over tokens by kind (`diagnosed`)."""

    name: str
    responses: int
    below_floor: float
    forms: float
    kinds: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class StudyPage:
    """What the templates show."""

    title: str
    subtitle: str
    question: str
    answer: str
    changes: Sequence[str]
    measure: str
    analysis: Analysis
    figures: Sequence[PageFigure]
    runs: Sequence[ShownRun]
    tokens: Mapping[str, float]
    core_hours: Mapping[str, float]
    diagnosed: Sequence[DiagnosedArm]
    cost: str
    versions: Sequence[Mapping[str, str]]


def write_report(analysis: Analysis, name: str, folder: Path) -> str:
    """Writes `report/` in the study's folder; an earlier one goes.

    Returns:
        The answer and where the page is, for the terminal.
    """
    directory = folder / FOLDER
    with own_folder(directory, "the report"):
        found = plots(analysis)
        (directory / "figures").mkdir(exist_ok=True)
        for plot in found:
            save_png(plot, directory / "figures" / f"{plot.name}.png")
        page = _page(analysis, name, [figure(plot, large=True) for plot in found], folder)
        html = render_page(
            SECTIONS,
            scripts=("figures.js",),
            packages=("megatron_rapo.study",),
            report=page,
            number=lambda value: f"{value:+.3f}".replace("-", "−"),
        )
        (directory / "report.html").write_text(html, encoding="utf-8")
        _write_numbers(analysis, directory / "numbers")
    lines = [sentence(told, len(analysis.contrasts)) for told in analysis.contrasts]
    return "\n".join([analysis.study.question, *lines, str(directory / "report.html")])


def _page(analysis: Analysis, name: str, figures: Sequence[PageFigure], folder: Path) -> StudyPage:
    outcome = Outcome.read(analysis.study.outcome)
    total = sum(one.core_hours for one in analysis.results)
    versions = {tuple(one.versions.items()): one.versions for one in analysis.results}
    return StudyPage(
        title="Study",
        subtitle=name,
        question=analysis.study.question,
        answer=answer(analysis),
        changes=changes(analysis),
        measure=outcome.measure,
        analysis=analysis,
        figures=figures,
        runs=list(_runs(analysis, outcome, folder)),
        tokens={
            arm.name: sum(one.tokens for one in arm.results.values()) / max(len(arm.results), 1)
            for arm in analysis.arms
        },
        core_hours={arm.name: sum(one.core_hours for one in arm.results.values()) for arm in analysis.arms},
        diagnosed=list(_diagnosed(analysis, outcome)),
        cost=f"{len(analysis.results)} finished runs took {total:.2f} core-hours: their commands' time, "
        "by the cores that were kept for them.",
        versions=list(versions.values()),
    )


def _runs(analysis: Analysis, outcome: Outcome, folder: Path) -> Iterator[ShownRun]:
    for result in analysis.results:
        value = f"{mean_outcome(result, outcome):.4f}" if result.stage == "main" else ""
        yield ShownRun(result, f"../runs/{result.run}", value)


def _diagnosed(analysis: Analysis, outcome: Outcome) -> Iterator[DiagnosedArm]:
    for arm in analysis.arms:
        found = [one.diagnosed.get(judged(one, outcome)[0]) for one in arm.results.values()]
        known = [one for one in found if one is not None]
        if known:
            below, forms = ([getattr(one, name) for one in known] for name in ("below_floor", "forms"))
            responses = sum(one.responses for one in known)
            yield DiagnosedArm(arm.name, responses, mean(below), mean(forms), mean_by_kind(known))


def _write_numbers(analysis: Analysis, folder: Path) -> None:
    """A CSV for each table of the page."""
    folder.mkdir(exist_ok=True)
    contrasts = [
        [
            told.contrast.name,
            told.outcome.measure,
            found.mean,
            found.low,
            found.high,
            told.low,
            told.high,
            *(found.bootstrap or ("", "")),
            found.p_value,
            told.holm,
            told.verdict,
            found.seeds,
            found.problems,
            found.seed_share,
        ]
        for told in analysis.contrasts
        if (found := told.difference) is not None
    ]
    _table(
        folder / "contrasts.csv",
        "contrast outcome difference low high together_low together_high bootstrap_low bootstrap_high p holm "
        "verdict seeds problems seed_share",
        contrasts,
    )
    curves = [
        [arm.name, k, point.mean, point.low, point.high]
        for arm in analysis.arms
        if arm.curve is not None
        for k, point in zip(arm.curve.ks, arm.curve.points, strict=True)
    ]
    _table(folder / "pass_at_k.csv", "arm k mean low high", curves)
    courses = [
        [arm.name, metric, step, *values]
        for arm in analysis.arms
        for metric, course in arm.paths.items()
        for step, *values in zip(course.steps, course.mean, course.low, course.high, strict=True)
    ]
    _table(folder / "training.csv", "arm metric step mean lowest highest", courses)


def _table(file: Path, columns: str, rows: Sequence[Sequence[object]]) -> None:
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(columns.split())
        writer.writerows(rows)
    partial.replace(file)
