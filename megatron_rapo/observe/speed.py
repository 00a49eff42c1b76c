"""How fast a run was, for how long its engines sampled, and what would have saved time."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rapo.observe.phase_memory import PHASES

WORTH_TELLING = 0.05  # of a step
MUCH_REPEATED = 0.25  # of the tokens

Steps = Sequence[Mapping[str, Any]]


def told_of_speed(metrics: Steps) -> list[str]:
    """Lines for people, of the median step that was not evaluated after; none where there is no step."""
    steps = [line for line in metrics if "time/step_s" in line and "time/evaluate_s" not in line]
    engines = _engines([line for line in steps if "time/sampling_s" in line])
    return [*_throughput(steps), *engines, *_repeated(steps)]


def _throughput(steps: Steps) -> list[str]:
    """Tokens a second, what the updates' computing came to, and the memory of the largest rank."""
    parts = []
    if (tokens := _median(steps, "throughput/tokens_per_s")) is not None:
        parts.append(f"{tokens:,.0f} tokens/s")
    if (rate := _median(steps, "throughput/update_tflop_per_s")) is not None:
        share = _median(steps, "throughput/mfu")
        of_peak = "" if share is None else f" ({share:.0%} of the device's peak{_recomputed(steps, share)})"
        shown = f"{rate:.3g} TFLOP/s" if rate >= 1 else f"{1000 * rate:.3g} GFLOP/s"
        parts.append(f"updates at {shown} a rank{of_peak}")
    if memory := max((line.get("memory/peak_gib", 0.0) for line in steps), default=0.0):
        parts.append(f"at most {memory:.2f} GiB a rank{_by_phase(steps)}")
    return [f"speed: {', '.join(parts)}"] if parts else []


def _recomputed(steps: Steps, share: float) -> str:
    """What recomputation adds to the share, where it adds something."""
    hardware = _median(steps, "throughput/hfu")
    return "" if hardware is None or hardware <= share else f", {hardware:.0%} with what is computed again"


def _by_phase(steps: Steps) -> str:
    """The memory of each phase, where it is told."""
    most = {phase: max(line.get(f"memory/{phase}_gib", 0.0) for line in steps) for phase in PHASES}
    told = ", ".join(f"{phase} {peak:.2f}" for phase, peak in most.items() if peak)
    return f" ({told})" if told else ""


def _engines(steps: Steps) -> list[str]:
    """For how long they sampled, and what a step would have taken ahead.

    That is the longer of its sampling and of its other work, and its publication, where engines and trainer
    have devices, or cores, of their own.
    """
    if not steps:
        return []
    step, sampling, waited, publish = (
        statistics.median(line.get(f"time/{name}_s", 0.0) for line in steps)
        for name in ("step", "sampling", "rollout", "publish")
    )
    line = f"engines sampled for {min(1.0, sampling / step):.0%} of a step"
    if max(one.get("rollout/staleness_max", 0) for one in steps) > 0:
        return [line]
    ahead = max(sampling, step - waited - publish) + publish
    saved = 1.0 - ahead / step
    if saved >= WORTH_TELLING:
        line += f"; rollout.max_staleness = 1 would have saved about {saved:.0%} of it (docs/ahead.md)"
    return [line]


def _repeated(steps: Steps) -> list[str]:
    """What prompts cost that each response computes anew."""
    share = _median(steps, "compute/repeated_tokens") or 0.0
    if share < MUCH_REPEATED:
        return []
    return [
        f"{share:.0%} of the tokens that were trained on were computed again for each response; "
        "algorithm.share_prompts = true computes them once (docs/shared-prompts.md)"
    ]


def _median(steps: Steps, name: str) -> float | None:
    values = [line[name] for line in steps if line.get(name) is not None]
    return statistics.median(values) if values else None
