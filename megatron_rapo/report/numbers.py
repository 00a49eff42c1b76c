"""The page's numbers as files: CSV for each table, JSON for all of them at once."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rapo.evaluation.compare import Comparison
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.report.contents import Benchmark, Diagnosis, Report
from megatron_rapo.report.timelines import RunTimeline

Row = Mapping[str, Any]


def write_numbers(report: Report, directory: Path) -> None:
    """Writes a CSV for each table that the report has, and `report.json` with all of them."""
    directory.mkdir(parents=True, exist_ok=True)
    found = tables(report)
    for name, rows in found.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        with (directory / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    text = json.dumps(
        {"title": report.title, "answer": report.answer, **found},
        ensure_ascii=False,
        indent=1,
        allow_nan=False,
    )
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")


def tables(report: Report) -> dict[str, list[Row]]:
    """Rows by table, of tables that have some. An estimate becomes `NAME`, `NAME_low` and `NAME_high`."""
    found: dict[str, list[Row]] = {
        "training": [{"run": run.name, **step} for run in report.runs for step in run.steps],
        "timeline": [row for timeline in report.timelines for row in _bars(timeline)],
        "engines": [row for timeline in report.timelines for row in _engines(timeline)],
        "frontier": [row for benchmark in report.benchmarks for row in _frontier(benchmark)],
        "scores": [row for benchmark in report.benchmarks for row in _scores(benchmark)],
    }
    for name, rows_of in {
        "differences": _differences,
        "crossover": _crossover,
        "ledger": _ledger,
        "hard": _hard,
    }.items():
        found[name] = [
            {"benchmark": benchmark.name, "model": against.model, **row}
            for benchmark, against in report.against()
            for row in rows_of(against.comparison)
        ]
    found["diagnostics"] = [row for diagnosis in report.diagnostics for row in _diagnostics(diagnosis)]
    return {name: rows for name, rows in found.items() if rows}


def _bars(timeline: RunTimeline) -> list[Row]:
    return [
        {"run": timeline.run, "lane": lane.label, **asdict(bar)}
        for lane in timeline.schedule.lanes
        for bar in lane.bars
    ]


def _engines(timeline: RunTimeline) -> list[Row]:
    """Whether an engine was busy, or what the trainer was at while it was not."""
    return [
        {
            "run": timeline.run,
            "engine": one.engine,
            "address": one.address,
            "state": state,
            "seconds": seconds,
        }
        for one in timeline.engines
        for state, seconds in [("busy", one.busy), *one.idle.items()]
    ]


def _frontier(benchmark: Benchmark) -> list[Row]:
    return [
        {"benchmark": benchmark.name, "model": score.model, "k": k, **_estimate("pass_at_k", estimate)}
        for score in benchmark.scores
        for k, estimate in zip(score.ks, score.curve, strict=True)
    ]


def _scores(benchmark: Benchmark) -> list[Row]:
    rows: list[Row] = []
    for score in benchmark.scores:
        statistics = score.statistics
        row = {
            "benchmark": benchmark.name,
            "model": score.model,
            "problems": statistics.problems,
            "samples": score.most,
            "stop_after_correct": score.stop,
            "drawn": statistics.drawn,
            **_estimate("mean_at_n", statistics.mean),
        }
        if statistics.graded and statistics.reward is not None:
            row |= _estimate("reward", statistics.reward)
        for k, estimate in statistics.majority_at_k.items():
            row |= {"majority_k": k, **_estimate("majority_at_k", estimate)}
        row |= {outcome.value: share for outcome, share in statistics.outcomes.items()}
        row |= {"unextracted": statistics.unextracted, "truncated": statistics.truncated}
        row |= {f"tokens_{name}": value for name, value in asdict(statistics.lengths).items()}
        rows.append(row)
    return rows


def _differences(comparison: Comparison) -> list[Row]:
    return [
        {"k": test.k, **_estimate("difference", test.difference), "p": test.p_value}
        for test in comparison.tests
    ]


def _crossover(comparison: Comparison) -> list[Row]:
    return [asdict(comparison.crossover)]


def _ledger(comparison: Comparison) -> list[Row]:
    return [
        {
            "problem": entry.problem,
            "change": str(entry.change),
            "base_correct": entry.base[0],
            "base_samples": entry.base[1],
            "model_correct": entry.model[0],
            "model_samples": entry.model[1],
            "p": entry.p_value,
            "q": entry.q_value,
            "significant": entry.significant,
        }
        for entry in comparison.ledger
    ]


def _hard(comparison: Comparison) -> list[Row]:
    hard = comparison.hard
    if hard is None:
        return []
    row: dict[str, Any] = {"problems": len(hard.problems), "chosen_by": hard.chosen_by, "k": hard.k}
    if hard.control is not None and hard.model is not None and hard.comparison is not None:
        row |= {**_estimate("control_pass_at_k", hard.control), **_estimate("model_pass_at_k", hard.model)}
        row |= {**_estimate("difference", hard.comparison.difference), "p": hard.comparison.p_value}
    return [row | {"control": comparison.control}]


def _diagnostics(diagnosis: Diagnosis) -> list[Row]:
    columns = ("forward_kl", "reverse_kl", "base_entropy", "model_entropy", "reaching")
    return [
        {"benchmark": diagnosis.benchmark, "model": diagnosis.model, "position": position}
        | dict(zip(columns, values, strict=True))
        for position, values in enumerate(
            zip(*(diagnosis.by_position[column] for column in columns), strict=True), start=1
        )
    ]


def _estimate(name: str, estimate: Estimate) -> Row:
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
