"""A comparison as JSON, as CSV, and as text for a terminal."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_rapo.evaluation.compare import Comparison
from megatron_rapo.evaluation.frontier import Crossover
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.evaluation.ledger import Change


def write(comparisons: Sequence[Comparison], directory: Path) -> None:
    """Writes comparison.json, with all there is, frontier.csv and ledger.csv."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(comparison) for comparison in comparisons], indent=1)
    (directory / "comparison.json").write_text(text)
    with (directory / "frontier.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["data", "setting", "model", "k", "pass@k", "low", "high"])
        for one in comparisons:
            for name, curve in (("base", one.base), ("model", one.model)):
                for k, point in zip(one.ks, curve, strict=True):
                    rows.writerow([one.data, one.setting, name, k, point.mean, point.low, point.high])
    with (directory / "ledger.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                *("data", "setting", "problem", "change", "base_correct", "base_samples"),
                *("model_correct", "model_samples", "p", "q", "significant"),
            ]
        )
        for one in comparisons:
            for entry in one.ledger:
                rows.writerow(
                    [
                        *(one.data, one.setting, entry.problem, entry.change, *entry.base),
                        *(*entry.model, entry.p_value, entry.q_value, entry.significant),
                    ]
                )


def describe(comparison: Comparison) -> str:
    """The comparison in some lines."""
    lines = [f"{comparison.data} {comparison.setting} · {len(comparison.ledger)} problems"]
    for test in comparison.tests:
        place = comparison.ks.index(test.k) if test.k in comparison.ks else None
        curves = (
            ""
            if place is None
            else (f"base {comparison.base[place].mean:.3f}, model {comparison.model[place].mean:.3f}, ")
        )
        lines.append(
            f"  pass@{test.k}: {curves}difference {_signed(test.difference)}, p = {test.p_value:.2g}: "
            f"{test.standing}"
        )
    lines.append(f"  crossover: {_crossover(comparison.crossover)}")
    all_entries = Counter(entry.change for entry in comparison.ledger)
    significant = Counter(entry.change for entry in comparison.ledger if entry.significant)
    ledger = ", ".join(
        f"{all_entries[change]} {change} ({significant[change]} significantly)" for change in Change
    )
    lines.append(f"  ledger: {ledger}")
    hard = comparison.hard
    if hard is None:
        lines.append(f"  hard subset: none, as {comparison.control}")
    elif hard.control is None or hard.model is None or hard.comparison is None:
        lines.append("  hard subset: the base solved every problem")
    else:
        lines.append(
            f"  hard subset: {len(hard.problems)} problems with 0 of {hard.chosen_by} by the base; "
            f"pass@{hard.k} there: base again {hard.control.mean:.3f}, model {hard.model.mean:.3f}, "
            f"difference {_signed(hard.comparison.difference)}, p = {hard.comparison.p_value:.2g} "
            f"(control: {comparison.control})"
        )
    return "\n".join(lines)


def _crossover(found: Crossover) -> str:
    low, high = ("beyond" if end is None else str(end) for end in (found.low, found.high))
    k = "none" if found.k is None else f"k = {found.k} [{low}, {high}]"
    ahead = "nowhere" if found.ahead_from is None else f"from k = {found.ahead_from} to {found.ahead_to}"
    behind = "nowhere" if found.behind_from is None else f"at k = {found.behind_from}"
    return f"{k}; beyond chance ahead {ahead}, behind {behind}"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
