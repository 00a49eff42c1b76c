"""Training curves: the metrics of a run by step, as plots."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rapo.errors import RapoError
from megatron_rapo.guards.findings import read_findings, told
from megatron_rapo.observe.catalogue import recorded
from megatron_rapo.observe.phase_memory import PHASES
from megatron_rapo.observe.step_lines import read_step_lines
from megatron_rapo.report.drawing import Line, Plot
from megatron_rapo.report.sources import file_name
from megatron_rapo.report.theme import series_colour
from megatron_rapo.timeline.simulated import is_simulated, shown_name

WINDOW = 5  # steps of the running mean


@dataclass(frozen=True)
class TrainingRun:
    """A run's metrics.

    Attributes:
        name: of its directory.
        steps: the lines of metrics.jsonl, oldest first.
        guards: what its guards found and did, lines for people.
        simulated: whether it never ran.
    """

    name: str
    steps: Sequence[dict[str, Any]]
    guards: Sequence[str] = ()
    simulated: bool = False


@dataclass(frozen=True)
class Curve:
    """A metric that is shown: its name in metrics.jsonl, title with unit, and whether it is a share of 1."""

    metric: str
    title: str
    share: bool = False

    @property
    def description(self) -> str:
        """What the metric means."""
        return recorded(self.metric)[0].meaning


CURVES = (
    Curve("reward/mean", "mean reward", share=True),
    Curve("reward/groups_without_variance", "groups without variance", share=True),
    Curve("rollout/response_tokens_mean", "response length, tokens"),
    Curve("rollout/truncated", "truncated responses", share=True),
    Curve("loss/entropy", "entropy, nats per token"),
    Curve("loss/divergence", "divergence, nats per token"),
    Curve("loss/total", "loss"),
    Curve("loss/clipped", "clipped ratio"),
    Curve("optimizer/gradient_norm", "gradient norm"),
    Curve("mismatch/log_prob_mean", "engine mismatch, nats"),
    Curve("throughput/tokens_per_s", "throughput, tokens per s"),
    Curve("time/step_s", "time of a step, s"),
)


def read_training(directory: Path) -> TrainingRun:
    """The metrics of the run in `directory`.

    Raises:
        RapoError: metrics.jsonl is damaged or has no step.
    """
    path = directory / "metrics.jsonl"
    steps = read_step_lines(path)
    if not steps:
        raise RapoError(f"{path} holds no step; report a run that has finished one")
    guards = told(read_findings(directory))
    return TrainingRun(shown_name(directory), steps, guards, is_simulated(directory))


def training_plots(runs: Sequence[TrainingRun]) -> list[Plot]:
    """The plots of all curves that a run has logged, pass@k on held-out problems first."""
    plots = [plot for run in runs for plot in _held_out(run, alone=len(runs) == 1)]
    for curve in CURVES:
        lines = [
            line for index, run in enumerate(runs) for line in _lines(run, curve, index, alone=len(runs) == 1)
        ]
        if lines:
            name = f"training_{curve.metric.replace('/', '_')}"
            plots.append(
                Plot(name, curve.title, curve.description, "step", "", tuple(lines), share=curve.share)
            )
    return [*plots, *(plot for run in runs for plot in _memory(run, alone=len(runs) == 1))]


def _memory(run: TrainingRun, alone: bool) -> list[Plot]:
    """The memory of each phase, where it was told."""
    lines = []
    for index, phase in enumerate(PHASES):
        told = [line for line in run.steps if line.get(f"memory/{phase}_gib") is not None]
        if told:
            values = [line[f"memory/{phase}_gib"] for line in told]
            lines.append(Line(phase, series_colour(index), [line["step"] for line in told], values))
    if not lines:
        return []
    title = "memory by phase, GiB" + ("" if alone else f", {run.name}")
    name = file_name("_".join(["training_memory", *([] if alone else [run.name])]))
    description = "The most memory of any rank in each phase of a step."
    return [Plot(name, title, description, "step", "", tuple(lines))]


def _lines(run: TrainingRun, curve: Curve, index: int, alone: bool) -> list[Line]:
    """The raw values, and over them the running mean of up to WINDOW steps."""
    points = [(line["step"], line[curve.metric]) for line in run.steps if curve.metric in line]
    if curve.metric.startswith("time/"):
        points = [point for point in points if point[0] > 0]  # step 0 trains nothing
    if all(y is None for _, y in points):
        return []
    x, y = [point[0] for point in points], [point[1] for point in points]
    colour, label = series_colour(index), curve.title if alone else run.name
    if len(x) <= WINDOW:
        return [Line(label, colour, x, y)]
    return [Line(label, colour, x, y, faint=True), Line(label, colour, x, running_mean(y, WINDOW))]


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """`[values]`: the mean of each value and the `window − 1` before it, gaps left out."""
    means: list[float | None] = []
    for stop in range(1, len(values) + 1):
        known = [value for value in values[max(0, stop - window) : stop] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def _held_out(run: TrainingRun, alone: bool) -> list[Plot]:
    """The evaluations during training, with their bands, for each data set and setting.

    Plots are of pass@k, and of the mean reward where it is measured.
    """
    found = [re.fullmatch(r"evaluate/(.*/)?(reward|pass@\d+)", name) for line in run.steps for name in line]
    metrics: dict[tuple[str, str], set[str]] = {}
    for name in filter(None, found):
        what = "mean reward" if name[2] == "reward" else "pass@k"
        metrics.setdefault((name[1] or "", what), set()).add(name[2])
    return [
        _held_out_plot(run, *where, sorted(of, key=lambda name: int(name.partition("@")[2] or 0)), alone)
        for where, of in metrics.items()
    ]


def _held_out_plot(run: TrainingRun, benchmark: str, what: str, metrics: Sequence[str], alone: bool) -> Plot:
    """Of one benchmark: `DATA/SETTING/`, or nothing where there is but one."""
    lines = []
    for index, name in enumerate(metrics):
        metric = f"evaluate/{benchmark}{name}"
        evaluated = [line for line in run.steps if line.get(metric) is not None]
        lines.append(
            Line(
                name,
                series_colour(index),
                [line["step"] for line in evaluated],
                [line[metric] for line in evaluated],
                [line[f"{metric}_low"] for line in evaluated],
                [line[f"{metric}_high"] for line in evaluated],
            )
        )
    problems = benchmark.strip("/").replace("/", ", ") or "held-out problems"
    title = f"{what} on {problems}" + ("" if alone else f", {run.name}")
    kind = "training_" + what.replace("@", "_at_").replace(" ", "_")
    name = file_name("_".join([kind, *filter(None, [benchmark, "" if alone else run.name])])).strip("_")
    description = f"{what} of the evaluations during training, with 95% intervals."
    return Plot(name, title, description, "step", "", tuple(lines), share=True)
