"""How long a run's engines waited for its trainer, and what sampling ahead would have saved."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WORTH_TELLING = 0.05  # of a step


def told_of_idling(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for people; none where there is no step to tell of.

    Of the median step that was not evaluated after. Ahead, a step would have taken the longer of its sampling
    and of its other work, and its publication: what engines and trainer do must have devices, or cores, of
    its own for that.
    """
    steps = [line for line in metrics if "time/sampling_s" in line and "time/evaluate_s" not in line]
    if not steps:
        return []
    step, sampling, waited, publish = (
        statistics.median(line.get(f"time/{name}_s", 0.0) for line in steps)
        for name in ("step", "sampling", "rollout", "publish")
    )
    idle = 1.0 - min(1.0, sampling / step)
    line = f"engines sampled for {1 - idle:.0%} of a step"
    if max(one.get("rollout/staleness_max", 0) for one in steps) > 0:
        return [line]
    ahead = max(sampling, step - waited - publish) + publish
    saved = 1.0 - ahead / step
    if saved >= WORTH_TELLING:
        line += f"; rollout.max_staleness = 1 would have saved about {saved:.0%} of it (docs/ahead.md)"
    return [line]
