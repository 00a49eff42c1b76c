"""Renders docs/metrics.md from the record: `python -m megatron_rapo.observe.document`."""

from __future__ import annotations

from megatron_rapo.observe.catalogue import Metric, groups, metrics

INTRODUCTION = """\
# Metrics

<!-- Generated: python -m megatron_rapo.observe.document > docs/metrics.md -->

Each step is a line of `<run>/metrics.jsonl`: `step`; `time_s`, the seconds that the run was at work until
then; and the metrics below, each a number. TensorBoard (`<run>/tensorboard`) and Weights & Biases
(`observe.wandb`) have the same, by the same names. Step 0 is the base, before the first update.
`megatron-rapo report RUN` draws the main ones; the terminal shows `reward/mean` and tokens a second.

Shares are from 0 to 1. In names, `<…>` stands for a name or number, and `[a|b]` for a part that may be a, b
or missing. `samples RUN` is short for [`megatron-rapo samples RUN`](samples.md); options are in
[configuration.md](configuration.md).

## What to look at first

| is it | look at |
|---|---|
| learning? | `reward/mean`, and `evaluate/pass@k` on problems that it does not train on |
| able to learn? | `reward/groups_without_variance`: far below 1 |
| getting answers to their end? | `rollout/truncated`, `reward/unknown`: near 0 |
| still exploring? | `loss/entropy`: not on its way to 0 |
| stable? | `optimizer/gradient_norm` without spikes, `loss/clipped` below some percent |
| training on what it sampled? | `mismatch/log_prob_mean`: as on the first step |
| fast? | `time/step_s`, and the phases of it |
"""


def render() -> str:
    """The whole page, in Markdown."""
    return "\n".join([INTRODUCTION, *(_section(name, about) for name, about in groups().items())])


def _section(group: str, about: str) -> str:
    rows = [_row(metric) for metric in metrics() if metric.group == group]
    head = ["| metric | what it is | unit | over | when it looks wrong |", "|---|---|---|---|---|"]
    return "\n".join([f"## {group}/\n", f"{about}\n", *head, *rows, ""])


def _row(metric: Metric) -> str:
    cells = (f"`{metric.name}`", metric.meaning, metric.unit, metric.over, metric.wrong)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(render(), end="")
