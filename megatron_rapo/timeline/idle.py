"""For how long engines were idle, by what the trainer did meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from megatron_rapo.timeline.record import Asked
from megatron_rapo.timeline.trace import Run


def idle_by_cause(run: Run) -> dict[str, dict[str, float]]:
    """Of each engine, seconds: `busy`, and else the phase that rank 0 was in meanwhile."""
    return {engine: _seconds(run, list(stretches(asked))) for engine, asked in run.asked.items()}


def told(run: Run) -> list[str]:
    """Engines' idle time by cause, for people; causes below a percent are left out."""
    lines = []
    for engine, seconds in idle_by_cause(run).items():
        whole = sum(seconds.values())
        causes = sorted((-s / whole, phase) for phase, s in seconds.items() if phase != "busy")
        shares = ", ".join(f"{phase} {-share:.0%}" for share, phase in causes if share <= -0.01)
        lines.append(f"{engine}: busy {seconds['busy'] / whole:.0%}; idle while the trainer was in: {shares}")
    return lines


def stretches(asked: Sequence[Asked]) -> Iterator[tuple[float, float]]:
    """From when to when at least one of an engine's requests was under way; in order, as these are."""
    begin, end = None, 0.0
    for one in asked:
        if begin is None or one.begun > end:
            if begin is not None:
                yield begin, end
            begin, end = one.begun, one.ended
        end = max(end, one.ended)
    if begin is not None:
        yield begin, end


def _seconds(run: Run, busy: Sequence[tuple[float, float]]) -> dict[str, float]:
    seconds: defaultdict[str, float] = defaultdict(float)
    next_one = 0  # of the stretches; those before have ended: a run has as many of both as steps
    for stay in sorted(run.stays[min(run.stays)], key=lambda one: one.begun):
        while next_one < len(busy) and busy[next_one][1] <= stay.begun:
            next_one += 1
        working, place = 0.0, next_one
        while place < len(busy) and busy[place][0] < stay.ended:
            working += min(stay.ended, busy[place][1]) - max(stay.begun, busy[place][0])
            place += 1
        seconds["busy"] += working
        seconds[stay.phase] += stay.ended - stay.begun - working
    return dict(seconds)
