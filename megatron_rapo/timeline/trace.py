"""A run's records as a trace that Perfetto and chrome://tracing show.

The format is Google's Trace Event Format, complete events (`ph` = "X"), times in microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_rapo.errors import RapoError
from megatron_rapo.timeline.record import Asked, Entered, read

_TRAINER, _ENGINES = 1, 2  # processes of the trace


@dataclass(frozen=True)
class Stay:
    """A rank's time in one phase: `outer/inner` where phases are within another."""

    begun: float
    ended: float
    step: int
    phase: str


@dataclass(frozen=True)
class Run:
    """What ranks and engines did.

    Attributes:
        stays: of each rank, in order, without gaps but where the run was not running.
        asked: of each engine, in order of sending.
    """

    stays: Mapping[int, Sequence[Stay]]
    asked: Mapping[str, Sequence[Asked]]


def load(run_directory: Path, steps: tuple[int, int] | None = None) -> Run:
    """Reads a run.

    Args:
        run_directory: `run.directory`.
        steps: the first and the last to read; None: all.

    Raises:
        RapoError: there is no record, or none of these steps.
    """
    stays: dict[int, list[Stay]] = {}
    asked: dict[str, list[Asked]] = {}
    for rank, entries in read(run_directory):
        entered = [entry for entry in entries if isinstance(entry, Entered)]
        stays[rank] = [
            Stay(one.at, other.at, one.step, one.phase)
            for one, other in pairwise(entered)
            if _within(one.step, steps) and other.step >= one.step  # else the run was started anew between
        ]
        for entry in entries:
            if isinstance(entry, Asked):
                asked.setdefault(entry.engine, []).append(entry)
    if not any(stays.values()):
        which = "" if steps is None else f" of steps {steps[0]} to {steps[1]}"
        raise RapoError(f"{run_directory} has no timeline{which}; name the directory of a run")
    first = min(own[0].begun for own in stays.values() if own)
    last = max(own[-1].ended for own in stays.values() if own)
    return Run(
        stays,
        {
            engine: sorted((one for one in of if first <= one.begun <= last), key=lambda one: one.begun)
            for engine, of in sorted(asked.items())
        },
    )


def chrome_trace(run: Run, of: str = "") -> dict[str, Any]:
    """The trace, to be written as JSON; `of` stands behind the names of its processes."""
    start = min(own[0].begun for own in run.stays.values() if own)
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": f"{name}{of}"}}
        for pid, name in ((_TRAINER, "trainer"), (_ENGINES, "engines"))
    ]
    for rank, stays in run.stays.items():
        events.append(_named_thread(_TRAINER, rank, f"rank {rank}"))
        events += [
            _event(_TRAINER, rank, one.phase, one.begun, one.ended, start, step=one.step) for one in stays
        ]
    lane = 0
    for engine, asked in run.asked.items():
        lanes: list[float] = []  # when each is free: a request of an engine may overlap with another
        for one in asked:
            place = next((n for n, free in enumerate(lanes) if free <= one.begun), len(lanes))
            lanes[place : place + 1] = [one.ended]
            told = {"responses": one.responses}
            events.append(_event(_ENGINES, lane + place, "request", one.begun, one.ended, start, **told))
        events += [_named_thread(_ENGINES, lane + n, f"{engine} ({n})") for n in range(len(lanes))]
        lane += len(lanes)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _within(step: int, steps: tuple[int, int] | None) -> bool:
    return steps is None or steps[0] <= step <= steps[1]


def _event(
    process: int, thread: int, name: str, begun: float, ended: float, start: float, **told: Any
) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": name,
        "ts": round((begun - start) * 1e6),
        "dur": round((ended - begun) * 1e6),
        "args": told,
    }


def _named_thread(process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": thread, "name": "thread_name", "args": {"name": name}}
