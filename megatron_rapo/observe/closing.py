"""What a finished run came to: rewards and pass@k where it began and where it ended, and its files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rapo.guards.findings import read_findings, told
from megatron_rapo.observe.speed import told_of_speed

WINDOW = 5  # steps that the reward's beginning and end are averaged over


def closing_summary(run_directory: Path) -> str:
    """The summary of a run from its metrics.jsonl, for people."""
    lines = (run_directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    guards = [f"guards: {line}" for line in told(read_findings(run_directory))]
    return "\n".join([*metrics_summary(metrics), *guards, "", *_files(run_directory)])


def metrics_summary(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """For people: reward at both ends, a row for each evaluation, how fast it was; what there is."""
    return _rewards(metrics) + _evaluations(metrics) + told_of_speed(metrics)


def _rewards(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the run, and below it of each source of a mixture."""
    found = (re.fullmatch(r"reward/([^/]+)/mean", name) for line in metrics for name in line)
    sources = dict.fromkeys(name[1] for name in found if name)
    of_all = {"mean reward": "reward/mean", **{f"  {name}": f"reward/{name}/mean" for name in sources}}
    if not any("reward/mean" in line for line in metrics):  # texts were given
        of_all = {"loss": "loss/total", "held-out loss": "evaluate/loss"}
    return [f"{what}: {told}" for what, metric in of_all.items() if (told := _ends(metrics, metric))]


def _ends(metrics: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    ends = reward_ends(metrics, metric)
    if ends is None:
        only = [line[metric] for line in metrics if line.get(metric) is not None]
        return f"{only[0]:.3f} in the only step" if only else None
    window, first, last = ends
    if window == 1:
        return f"{first:.3f} in the first step, {last:.3f} in the last"
    return f"{first:.3f} over the first {window} steps, {last:.3f} over the last {window}"


def reward_ends(
    metrics: Sequence[Mapping[str, Any]], metric: str = "reward/mean"
) -> tuple[int, float, float] | None:
    """Steps averaged over, and the mean reward over the first and the last so many, which share none.

    None where fewer than two steps have rewards.
    """
    rewards = [line[metric] for line in metrics if line.get(metric) is not None]
    if len(rewards) < 2:
        return None
    window = min(WINDOW, len(rewards) // 2)
    first, last = (sum(part) / window for part in (rewards[:window], rewards[-window:]))
    return window, first, last


def _evaluations(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each data set and setting: a row for each evaluated step (the base is step 0).

    Columns are pass@k, and the mean reward where it is measured.
    """
    keys: dict[str, dict[str, None]] = {}  # in the order in which they were logged
    for name in (name for line in metrics for name in line):
        if found := re.fullmatch(r"evaluate/(.*/)?(reward|pass@\d+)", name):
            keys.setdefault(found[1] or "", {})[name] = None
    return [row for of, names in keys.items() for row in _table(metrics, of, list(names))]


def _table(metrics: Sequence[Mapping[str, Any]], benchmark: str, keys: Sequence[str]) -> list[str]:
    """Of one benchmark: `DATA/SETTING/`, or nothing where there is but one."""
    title = benchmark.strip("/").replace("/", ", ") or "held-out problems"
    rows = [[title, *(key.rpartition("/")[2] for key in keys)]]
    for line in metrics:
        if keys[0] not in line:
            continue
        name = "base" if line["step"] == 0 else f"step {line['step']}"
        cells = [f"{line[key]:.3f} [{line[f'{key}_low']:.3f}, {line[f'{key}_high']:.3f}]" for key in keys]
        rows.append([name, *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _files(run_directory: Path) -> list[str]:
    has_adapter = (run_directory / "adapter").is_dir()
    contents = {
        "model": "trained policy, as transformers and SGLang load it",
        **({"adapter": "its adapters alone, as PEFT loads them"} if has_adapter else {}),
        "metrics.jsonl": "metrics of each step; TensorBoard in tensorboard/",
        "checkpoints": "to go on from",
        "config.toml": "resolved configuration",
    }
    return [f"{run_directory / name}  {text}" for name, text in contents.items()]
