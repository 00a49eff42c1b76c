"""What the page shows: numbers that are computed elsewhere, in the form in which they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rapo.evaluation.compare import Comparison
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.evaluation.statistics import Statistics
from megatron_rapo.report.configuration import Table
from megatron_rapo.report.drawing import Plot
from megatron_rapo.report.figures import PageFigure
from megatron_rapo.report.responses import Browser
from megatron_rapo.report.timelines import RunTimeline
from megatron_rapo.report.training import TrainingRun


@dataclass(frozen=True)
class Tile:
    """A number of the summary: label, value, what stands beside it, and what it says of the model."""

    label: str
    value: str
    beside: str
    verdict: str = ""  # better, worse, unsure, or nothing


@dataclass(frozen=True)
class Headline:
    """The summary's numbers of one model on one benchmark."""

    benchmark: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Scores:
    """A model on a benchmark.

    Attributes:
        most: N, samples that a problem may have.
        stop: correct samples at which a problem was done, where the budget was adaptive.
        ks: of the curve.
        curve: pass@k for each.
        statistics: everything but pass@k.
    """

    model: str
    most: int
    stop: int | None
    ks: tuple[int, ...]
    curve: tuple[Estimate, ...]
    statistics: Statistics

    def pass_at(self, k: int) -> Estimate:
        """pass@k."""
        return self.curve[self.ks.index(k)]


@dataclass(frozen=True)
class Against:
    """A model's comparison with the base.

    Attributes:
        run: the training run's directory; None for a model that is of none.
    """

    model: str
    run: str | None
    comparison: Comparison


@dataclass(frozen=True)
class Benchmark:
    """One data set at one setting.

    Attributes:
        questions: by id, in the data set's order.
        shown_k: those that the tables have room for.
        scores: of each model, the base first.
        against: each other model's comparison with the base.
    """

    name: str
    questions: Mapping[str, str]
    figures: tuple[PageFigure, ...]
    shown_k: tuple[int, ...]
    scores: tuple[Scores, ...]
    against: tuple[Against, ...]

    def last_of_each_run(self) -> list[Against]:
        """What the summary speaks of: the last model of each run, and every model that is of none."""
        return list({entry.run or entry.model: entry for entry in self.against}.values())


@dataclass(frozen=True)
class Diagnosis:
    """Where a model's correct answers come from.

    Attributes:
        by_position: `[positions]` each: forward_kl, reverse_kl, base_entropy, model_entropy, reaching.
    """

    benchmark: str
    model: str
    figures: tuple[PageFigure, ...]
    facts: tuple[Tile, ...]
    by_position: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """Everything on the page. A part without content has no section."""

    title: str
    subtitle: str
    answer: str
    headlines: tuple[Headline, ...] = ()
    runs: tuple[TrainingRun, ...] = ()
    training: tuple[PageFigure, ...] = ()
    timelines: tuple[RunTimeline, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    diagnostics: tuple[Diagnosis, ...] = ()
    browser: Browser | None = None
    browser_notes: tuple[str, ...] = ()
    configuration: tuple[Table, ...] = ()

    def plots(self) -> list[Plot]:
        """What all figures show, in the page's order."""
        figures = [
            *self.training,
            *(figure for benchmark in self.benchmarks for figure in benchmark.figures),
            *(figure for diagnosis in self.diagnostics for figure in diagnosis.figures),
        ]
        return [figure.plot for figure in figures]

    def controls(self) -> list[str]:
        """What controls the hard subsets."""
        compared = (against.comparison for _, against in self.against())
        return list(dict.fromkeys(one.control for one in compared if one.hard is not None))

    @property
    def adaptive(self) -> bool:
        """Whether a model's budget was."""
        return any(score.stop is not None for benchmark in self.benchmarks for score in benchmark.scores)

    def against(self) -> Iterator[tuple[Benchmark, Against]]:
        """All comparisons with the base."""
        for benchmark in self.benchmarks:
            for against in benchmark.against:
                yield benchmark, against
