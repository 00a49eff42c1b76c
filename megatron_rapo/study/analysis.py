"""All that a study's results tell, from its small tables alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_rapo.evaluation.frontier import grid
from megatron_rapo.study.added_seeds import Look, read_looks
from megatron_rapo.study.contrasts import Told, tell
from megatron_rapo.study.crossed import Crossed, crossed
from megatron_rapo.study.outcomes import check_same_problems, judged, unseen, values
from megatron_rapo.study.results import COMPUTE, Result
from megatron_rapo.study.scaling import PowerLaw, power_law
from megatron_rapo.study.schema import Outcome, Study
from megatron_rapo.study.stages import Stages
from megatron_rapo.study.tuning import Search

LARGEST_K = 1024


@dataclass(frozen=True)
class Curve:
    """A mean over seeds and problems by k, of an arm."""

    ks: Sequence[int]
    points: Sequence[Crossed]


@dataclass(frozen=True)
class Course:
    """A metric of an arm's training by step: the mean over seeds, and the lowest and highest of them."""

    steps: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class ArmResults:
    """An arm.

    Attributes:
        results: by seed.
        outcome: the primary one; None with fewer than two seeds.
        curve: pass@k; None with fewer than two seeds.
        paths: by metric.
        law: outcome of the evaluations during training against compute; `law_of` names the metric, `law_by`
            the compute: `tflop`, or `tokens` where a result has no other.
    """

    name: str
    results: Mapping[int, Result]
    outcome: Crossed | None
    curve: Curve | None
    paths: Mapping[str, Course]
    law: PowerLaw | None
    law_of: str
    law_by: str


@dataclass(frozen=True)
class Excluded:
    """A run that takes no part, and why."""

    run: str
    why: str


@dataclass(frozen=True)
class Analysis:
    """Everything that the report shows.

    Attributes:
        contrasts: the primary first.
        arms: in the study's order.
        searches: by arm.
        excluded: runs of the study without a result.
        seen: problems that were judged, and are left out, as the search saw them too.
        looks: at the interval, where seeds were added until it was narrow.
        results: of both stages.
    """

    study: Study
    contrasts: Sequence[Told]
    arms: Sequence[ArmResults]
    searches: Mapping[str, Search]
    excluded: Sequence[Excluded]
    seen: int
    looks: Sequence[Look]
    results: Sequence[Result]

    @property
    def primary(self) -> Told:
        """The contrast that the study was made for."""
        return self.contrasts[0]


def analyse(study: Study, stages: Stages, folder: Path) -> Analysis:
    """Computes all of it.

    Raises:
        RapoError: results cannot be compared, or the search saw many held-out problems.
    """
    outcome = Outcome.read(study.outcome)
    searched, main = (
        [stages.results[run.name] for run in stage if run.name in stages.results]
        for stage in (stages.tuning, stages.main)
    )
    main, seen = unseen(searched, main)
    by_arm: dict[str, dict[int, Result]] = {arm.name: {} for arm in stages.arms}
    for result in main:
        by_arm[result.arm][result.seed] = result
    check_same_problems(main, outcome)
    return Analysis(
        study=study,
        contrasts=tell(study.contrasts, study.outcome, by_arm),
        arms=[_arm(name, results, outcome) for name, results in by_arm.items()],
        searches=stages.searches,
        excluded=[
            Excluded(run.name, stages.why_missing(run, folder))
            for run in [*stages.tuning, *stages.main]
            if run.name not in stages.results
        ]
        + [
            Excluded(
                f"{arm.name}, seed {seed}", f"it follows {arm.follows}, which has no result of this seed"
            )
            for arm, seed in stages.later
        ],
        seen=seen,
        looks=read_looks(folder),
        results=[*searched, *main],
    )


def _arm(name: str, results: Mapping[int, Result], outcome: Outcome) -> ArmResults:
    law_by = _compute_of(list(results.values()))
    law_of, points = _against_compute(results, outcome, law_by)
    several = len(results) > 1
    return ArmResults(
        name=name,
        results=results,
        outcome=crossed(np.stack([values(one, outcome) for one in results.values()]), (0.0, 1.0))
        if several
        else None,
        curve=_curve(list(results.values()), outcome) if several else None,
        paths=_paths(list(results.values())),
        law=power_law(points),
        law_of=law_of,
        law_by=law_by,
    )


def _curve(results: Sequence[Result], outcome: Outcome) -> Curve:
    most = min(min(judged(one, outcome)[1].samples) for one in results)
    ks = grid(min(most, LARGEST_K))
    points = []
    for k in ks:
        at_k = replace(outcome, k=k)
        points.append(crossed(np.stack([values(one, at_k) for one in results]), (0.0, 1.0)))
    return Curve(ks, points)


def _paths(results: Sequence[Result]) -> dict[str, Course]:
    """Of steps and metrics that all seeds have."""
    trained = [one for one in results if one.steps]
    metrics = [name for name in (trained[0].paths if trained else ()) if name not in COMPUTE]
    found = {}
    for metric in metrics:
        by_step: dict[int, list[float]] = {}
        for one in trained:
            for step, value in zip(one.steps, one.paths.get(metric, ()), strict=False):
                if value is not None:
                    by_step.setdefault(step, []).append(value)
        whole = {step: values for step, values in sorted(by_step.items()) if len(values) == len(trained)}
        if whole:
            found[metric] = Course(
                list(whole),
                [sum(values) / len(values) for values in whole.values()],
                [min(values) for values in whole.values()],
                [max(values) for values in whole.values()],
            )
    return found


def _compute_of(results: Sequence[Result]) -> str:
    """FLOPs where all runs counted them."""
    return "tflop" if all(any(one.paths.get("tflop", ())) for one in results if one.steps) else "tokens"


def _against_compute(
    results: Mapping[int, Result], outcome: Outcome, compute: str
) -> tuple[str, dict[int, list[tuple[float, float]]]]:
    """(compute, outcome) of each seed: of held-out problems where a run evaluated, else training's reward."""
    held_out = f"evaluate/{outcome.measure}"
    if outcome.data is not None:
        held_out = f"evaluate/{outcome.data}/{outcome.setting}/{outcome.measure}"
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for metric in (held_out, "reward/mean"):
        for seed, one in results.items():
            pairs = zip(one.paths.get(compute, ()), one.paths.get(metric, ()), strict=False)
            points.setdefault(metric, {})[seed] = [(t, v) for t, v in pairs if t and v]
    evaluated = min((len(one) for one in points.get(held_out, {}).values()), default=0)
    metric = held_out if evaluated >= 3 else "reward/mean"
    return metric, points.get(metric, {})
