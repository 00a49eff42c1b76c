"""What runs cost: as those of this study did, or as one that has begun does; else nobody knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_rapo.study.plan import PlannedRun
from megatron_rapo.study.results import Result
from megatron_rapo.study.standing import Standing, State


@dataclass(frozen=True)
class Cost:
    """Of runs together.

    Attributes:
        core_hours: of those whose cost can be told.
        unknown: runs whose cost cannot.
        source: what it was told from.
    """

    core_hours: float
    unknown: int
    source: str

    def __str__(self) -> str:
        known = f"{self.core_hours:.2f} core-hours" if self.source else ""
        unknown = f"{self.unknown} runs of unknown cost" if self.unknown else ""
        return ", and ".join(filter(None, [known, unknown])) or "nothing"


def spent(results: Mapping[str, Result]) -> Cost:
    """What the finished runs cost."""
    return Cost(sum(one.core_hours for one in results.values()), 0, "measured")


def left(standings: Sequence[Standing], results: Mapping[str, Result]) -> Cost:
    """What those that are not done will cost."""
    total, unknown, sources = 0.0, 0, set()
    for standing in standings:
        if standing.state in (State.DONE, State.FAILED):
            continue
        seconds, source = estimate(standing.run, standings, results)
        if seconds is None:
            unknown += 1
        else:
            total += max(seconds - _done_s(standing), 0.0) * standing.run.cores / 3600
            sources.add(source)
    return Cost(total, unknown, ", ".join(sorted(sources)))


def estimate(
    run: PlannedRun, standings: Sequence[Standing], results: Mapping[str, Result]
) -> tuple[float | None, str]:
    """Seconds of a run, and what that is told from: "" where nothing tells it.

    Finished runs of its arm and stage count first, then those of other arms that are trained as well, then
    the pace of runs that have begun, which tells nothing of evaluations.
    """
    of_stage = [one for one in results.values() if one.stage == run.stage]
    for kept, source in (
        ([one for one in of_stage if one.arm == run.arm], "finished runs of the same arm"),
        ([one for one in of_stage if bool(one.tokens) == run.train], "finished runs of other arms"),
    ):
        if kept:
            return sum(one.seconds for one in kept) / len(kept), source
    paces = [
        one.seconds_a_step * run.config.run.steps
        for one in standings
        if one.seconds_a_step is not None and one.run.train and run.train
    ]
    return (sum(paces) / len(paces), "steps of runs that have begun") if paces else (None, "")


def _done_s(standing: Standing) -> float:
    return (standing.step or 0) * (standing.seconds_a_step or 0.0)
