"""A run's newest steps as a picture, and for how long its engines were idle, by cause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.report.schedule import Bar, Lane, Schedule, draw_schedule
from megatron_rapo.report.sources import file_name
from megatron_rapo.timeline.idle import idle_by_cause, stretches
from megatron_rapo.timeline.record import FOLDER
from megatron_rapo.timeline.simulated import shown_name
from megatron_rapo.timeline.trace import Run, load

STEPS = 3  # in the picture
LANES = 8  # of ranks, and of engines
WIDTHS = (900, 380)  # CSS pixels
_BETWEEN = "between phases"
_SAMPLING = "engine at work"
_COLOURS = {
    "rollout": "rule",  # the trainer waits
    "reward": "series-6",
    "annotate": "series-4",
    "update": "series-1",
    "publish": "series-2",
    "evaluate": "series-5",
    "checkpoint": "doubt",
    _SAMPLING: "series-3",
}
_OTHERS = "muted"


@dataclass(frozen=True)
class EngineTime:
    """An engine's seconds since its run was last started.

    Attributes:
        address: of the engine; one that came back may have another.
        busy: with at least one request.
        idle: without, by the phase that the trainer was in; the longest first.
    """

    engine: str
    address: str
    busy: float
    idle: Mapping[str, float]

    @property
    def whole(self) -> float:
        """All of these seconds."""
        return self.busy + sum(self.idle.values())


@dataclass(frozen=True)
class RunTimeline:
    """What a run's record of times says.

    Attributes:
        run: its name.
        schedule: of its newest steps.
        svgs: of it, widest first.
        engines: in the picture's order.
        left_out: what the picture has no room for.
    """

    run: str
    schedule: Schedule
    svgs: tuple[str, ...]
    engines: tuple[EngineTime, ...]
    left_out: str = ""


def timelines_of(runs: Sequence[Path]) -> list[RunTimeline]:
    """Of each run that has a record with a finished step in it."""
    return [timeline for path in runs if (path / FOLDER).is_dir() for timeline in _timeline(path)]


def _timeline(directory: Path) -> Iterator[RunTimeline]:
    try:
        run = _since_start(load(directory))
    except RapoError:  # it ended before its first phase did: there is nothing to be shown
        return
    steps = sorted({stay.step for stay in run.stays[min(run.stays)] if stay.phase == "update"})[-STEPS:]
    if not steps:
        return
    name = shown_name(directory)
    schedule = _schedule(run, steps, name)
    yield RunTimeline(
        name,
        schedule,
        tuple(draw_schedule(schedule, width) for width in WIDTHS),
        tuple(_engines(run)),
        _left_out(run),
    )


def _schedule(run: Run, steps: Sequence[int], name: str) -> Schedule:
    shown = {
        rank: [stay for stay in stays if stay.step in steps]
        for rank, stays in sorted(run.stays.items())[:LANES]
    }
    start = min(stays[0].begun for stays in shown.values() if stays)
    end = max(stays[-1].ended for stays in shown.values() if stays)
    lanes = [
        Lane(
            f"rank {rank}",
            tuple(
                Bar(stay.begun - start, stay.ended - start, _outer(stay.phase))
                for stay in stays
                if _outer(stay.phase) != _BETWEEN
            ),
        )
        for rank, stays in shown.items()
    ]
    for number, asked in enumerate(list(run.asked.values())[:LANES]):
        within = ((max(begun, start), min(ended, end)) for begun, ended in stretches(asked))
        bars = (Bar(begun - start, ended - start, _SAMPLING) for begun, ended in within if begun < ended)
        lanes.append(Lane(f"engine {number}", tuple(bars)))
    done = {bar.what for lane in lanes for bar in lane.bars}
    named = {what: colour for what, colour in _COLOURS.items() if what in done}
    first_rank = shown[min(shown)]
    return Schedule(
        file_name(f"timeline_{name}"),
        f"steps {steps[0]} to {steps[-1]}",
        "What each rank was at, and when each engine had requests. Gaps are what is between phases.",
        tuple(lanes),
        tuple((next(one.begun for one in first_rank if one.step == n) - start, f"step {n}") for n in steps),
        {**named, **dict.fromkeys(sorted(done - set(named)), _OTHERS)},
    )


def _since_start(run: Run) -> Run:
    """What was since the run was last started: one that was killed repeats steps, and has other engines."""
    stays = {}
    for rank, own in run.stays.items():
        started = max((place for place, stay in enumerate(own) if stay.step == 0), default=-1)
        stays[rank] = own[started + 1 :]
    begun = min((own[0].begun for own in stays.values() if own), default=0.0)
    asked = {engine: [one for one in of if one.begun >= begun] for engine, of in run.asked.items()}
    return Run(stays, {engine: of for engine, of in asked.items() if of})


def _outer(phase: str) -> str:
    return phase.partition("/")[0]


def _engines(run: Run) -> Iterator[EngineTime]:
    for number, (address, seconds) in enumerate(idle_by_cause(run).items()):
        causes: dict[str, float] = {}
        for phase, spent in seconds.items():
            causes[_outer(phase)] = causes.get(_outer(phase), 0.0) + spent
        busy = causes.pop("busy")
        longest = sorted(causes.items(), key=lambda one: (-one[1], one[0]))
        yield EngineTime(f"engine {number}", address, busy, dict(longest))


def _left_out(run: Run) -> str:
    counts = [(len(run.stays), "ranks"), (len(run.asked), "engines")]
    many = [f"the first {LANES} of {count:,} {what}" for count, what in counts if count > LANES]
    return f"Shown are {' and '.join(many)}." if many else ""
