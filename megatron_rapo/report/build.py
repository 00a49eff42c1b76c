"""A report from its sources: every part that they have something for."""

from __future__ import annotations

from megatron_rapo.report.benchmarks import benchmarks_of
from megatron_rapo.report.browsing import browser_of
from megatron_rapo.report.configuration import configuration_tables
from megatron_rapo.report.contents import Report
from megatron_rapo.report.diagnostics import diagnoses_of
from megatron_rapo.report.figures import figure
from megatron_rapo.report.sources import Sources
from megatron_rapo.report.summary import answer, headlines
from megatron_rapo.report.timelines import timelines_of
from megatron_rapo.report.training import read_training, training_plots
from megatron_rapo.timeline.simulated import is_simulated, shown_name


def build_report(sources: Sources) -> Report:
    """Gathers what is told of runs and evaluations.

    Raises:
        RapoError: a run is damaged, or evaluations cannot be compared.
    """
    runs = [read_training(path) for path in sources.runs]
    benchmarks = benchmarks_of(sources.models, sources.control)
    browser, notes = browser_of(sources)
    return Report(
        title=_title(sources),
        subtitle=_subtitle(sources),
        answer=answer(runs, benchmarks),
        headlines=tuple(headlines(benchmarks)),
        runs=tuple(runs),
        training=tuple(figure(plot) for plot in training_plots(runs)),
        timelines=tuple(timelines_of(sources.runs)),
        benchmarks=tuple(benchmarks),
        diagnostics=tuple(diagnoses_of(sources.models)),
        browser=browser,
        browser_notes=notes,
        configuration=tuple(configuration_tables(sources)),
    )


def _title(sources: Sources) -> str:
    if sources.runs and all(map(is_simulated, sources.runs)) and not sources.models:
        return "Report of simulated runs"
    return "Exploration report" if sources.models else "Training report"


def _subtitle(sources: Sources) -> str:
    names = list(map(shown_name, sources.runs)) + [model.label for model in sources.models]
    return " · ".join(dict.fromkeys(names))
