"""The report in words: answer and headlines at the top of the page, and plain text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.evaluation.ledger import Change
from megatron_rapo.observe.closing import metrics_summary, reward_ends
from megatron_rapo.report.contents import Against, Benchmark, Headline, Report, Tile
from megatron_rapo.report.training import TrainingRun
from megatron_rapo.report.words import (
    crossover_sentence,
    crossover_value,
    hard_sentence,
    ledger_counts,
    ledger_sentence,
    p_value,
    signed,
    standing,
    verdict,
)


def answer(runs: Sequence[TrainingRun], benchmarks: Sequence[Benchmark]) -> str:
    """Whether each run's last model is beyond the base, a line each; else what became of the reward."""
    compared = [(benchmark, last) for benchmark in benchmarks for last in benchmark.last_of_each_run()]
    if compared:
        return "\n".join(_standing(benchmark, against) for benchmark, against in compared)
    if benchmarks:
        return "One model was evaluated; nothing is there to compare it with. " + _rewards(runs)
    return _rewards(runs)


def _standing(benchmark: Benchmark, against: Against) -> str:
    comparison = against.comparison
    test = comparison.tests[-1]
    sentence = standing(against.model, test, comparison.base[-1], comparison.model[-1])
    return f"On {benchmark.name}, {sentence} {crossover_sentence('It', comparison)}"


def _rewards(runs: Sequence[TrainingRun]) -> str:
    sentences = []
    for run in runs:
        ends = reward_ends(run.steps)
        name = "The run" if len(runs) == 1 else run.name
        if run.simulated:
            sentences.append(f"{name} was simulated: it never ran, and learnt nothing.")
        elif ends is None:
            sentences.append(f"{name} has finished fewer than two training steps.")
        else:
            window, first, last = ends
            sentences.append(
                f"{name} earned a mean reward of {first:.3f} over its first {_steps(window)} and {last:.3f} "
                f"over its last{'' if window == 1 else f' {window}'}, of {run.steps[-1]['step']} in all."
            )
    return " ".join(sentences)


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def headlines(benchmarks: Sequence[Benchmark]) -> list[Headline]:
    """The numbers of each run's last model on each benchmark."""
    return [
        Headline(f"{last.model} on {benchmark.name}", tuple(_tiles(last)))
        for benchmark in benchmarks
        for last in benchmark.last_of_each_run()
    ]


def _tiles(against: Against) -> list[Tile]:
    comparison = against.comparison
    tiles = []
    for test in dict.fromkeys((comparison.tests[0], comparison.tests[-1])):
        place = comparison.ks.index(test.k)
        beside = (
            f"base {comparison.base[place].mean:.3f} · {signed(test.difference)} · {p_value(test.p_value)}"
        )
        value = f"{comparison.model[place].mean:.3f}"
        tiles.append(Tile(f"pass@{test.k:,}", value, beside, verdict(test)))
    tiles.append(Tile("crossover", *crossover_value(comparison)))
    counts, sure = ledger_counts(comparison.ledger)
    new, lost = Change.NEWLY_SOLVED, Change.LOST
    beside = f"{sure[new]:,} significantly · lost {counts[lost]:,}, {sure[lost]:,} significantly"
    tiles.append(Tile("newly solved problems", f"{counts[new]:,}", beside))
    hard = comparison.hard
    if (
        hard is not None
        and hard.model is not None
        and hard.control is not None
        and hard.comparison is not None
    ):
        beside = f"the base asked again {hard.control.mean:.3f} · {signed(hard.comparison.difference)}"
        label = f"pass@{hard.k:,} on {len(hard.problems):,} hard problems"
        tiles.append(Tile(label, f"{hard.model.mean:.3f}", beside, verdict(hard.comparison)))
    return tiles


def summary_text(report: Report) -> str:
    """The summary as plain text, lines for people."""
    lines = [report.title, "", report.answer]
    for benchmark, against in report.against():
        comparison = against.comparison
        lines += ["", f"{against.model} on {benchmark.name}:"]
        for test in comparison.tests:
            place = comparison.ks.index(test.k)
            lines.append(
                f"  pass@{test.k:<6,} {comparison.model[place].mean:.3f}  "
                f"base {comparison.base[place].mean:.3f}  "
                f"difference {signed(test.difference)}  {p_value(test.p_value)}"
            )
        lines += [
            f"  {sentence}"
            for sentence in (
                crossover_sentence(against.model, comparison),
                ledger_sentence(comparison.ledger),
                hard_sentence(comparison),
            )
        ]
    for run in report.runs:
        guards = [f"guards: {line}" for line in run.guards]
        lines += ["", f"{run.name}:", *(f"  {line}" for line in [*metrics_summary(run.steps), *guards])]
    return "\n".join(lines) + "\n"
