"""The figures of a study's report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from megatron_rapo.report.drawing import Line, Plot
from megatron_rapo.report.theme import SERIES, series_colour
from megatron_rapo.study.analysis import Analysis, ArmResults, Course
from megatron_rapo.study.contrasts import solved_by
from megatron_rapo.study.diagnosed import mean_by_position
from megatron_rapo.study.outcomes import judged, values
from megatron_rapo.study.schema import Outcome

# Metrics of training that have a figure, with their titles.
COURSES = {
    "reward/mean": "mean reward in training",
    "loss/entropy": "entropy, nats a token",
    "loss/divergence": "divergence from the reference, nats a token",
}
# What the power law is fitted by.
LAWS = {"tflop": "TFLOP of updates", "tokens": "response tokens trained on"}
LAW_POINTS = 16


def plots(analysis: Analysis) -> list[Plot]:
    """All that there is something for."""
    arms = [arm for arm in analysis.arms if arm.results]
    found = [_curves(arms), *(_course(arms, metric, title) for metric, title in COURSES.items())]
    outcome = Outcome.read(analysis.study.outcome)
    found += [*_laws(arms), _by_difficulty(analysis, outcome), *_by_position(arms, outcome)]
    found += _sensitivity(analysis)
    return [plot for plot in found if plot.lines]


def _curves(arms: Sequence[ArmResults]) -> Plot:
    lines = [
        Line(
            arm.name,
            series_colour(place),
            arm.curve.ks,
            [point.mean for point in arm.curve.points],
            [point.low for point in arm.curve.points],
            [point.high for point in arm.curve.points],
            dashed=_dashed(place, arm),
        )
        for place, arm in enumerate(arms)
        if arm.curve is not None
    ]
    description = "Chance that one of k samples is correct, mean over seeds and problems, with 95% bands."
    return Plot("pass_at_k", "pass@k", description, "k", "", tuple(lines), scale="log2", share=True)


def _course(arms: Sequence[ArmResults], metric: str, title: str) -> Plot:
    lines = [
        Line(
            arm.name,
            series_colour(place),
            course.steps,
            course.mean,
            course.low,
            course.high,
            dashed=_dashed(place, arm),
        )
        for place, arm in enumerate(arms)
        if (course := arm.paths.get(metric)) is not None
    ]
    description = "Mean over seeds by step; the band reaches from the lowest seed to the highest."
    return Plot(metric.replace("/", "_"), title, description, "step", "", tuple(lines))


def _laws(arms: Sequence[ArmResults]) -> list[Plot]:
    """A figure for each kind of compute that arms are fitted by: the means over seeds, and the power law."""
    found = []
    for compute, title in LAWS.items():
        lines: list[Line] = []
        for place, arm in enumerate(arms):
            if arm.law_by == compute:
                lines += _law(place, arm)
        description = f"Outcome against {title}: faint as measured, strong the fitted power law."
        found.append(
            Plot(
                f"outcome_by_{compute}",
                "outcome against compute",
                description,
                title,
                "",
                tuple(lines),
                scale="log2",
            )
        )
    return found


def _law(place: int, arm: ArmResults) -> list[Line]:
    if arm.law is None or arm.law_of not in arm.paths:
        return []
    course, colour = arm.paths[arm.law_of], series_colour(place)
    compute = _mean_compute(arm, course)
    shown = [(t, y) for t, y in zip(compute, course.mean, strict=True) if t > 0 and y > 0]
    low, high = arm.law.compute
    fitted = [low * (high / low) ** (i / (LAW_POINTS - 1)) for i in range(LAW_POINTS)]
    return [
        Line(arm.name, colour, [t for t, _ in shown], [y for _, y in shown], faint=True),
        Line(arm.name, colour, fitted, [arm.law.at(t) for t in fitted], dashed=_dashed(place, arm)),
    ]


def _mean_compute(arm: ArmResults, course: Course) -> list[float]:
    """At the course's steps."""
    by_step: dict[int, list[float]] = {}
    for one in arm.results.values():
        for step, spent in zip(one.steps, one.paths.get(arm.law_by, ()), strict=False):
            by_step.setdefault(step, []).append(float(spent or 0.0))
    return [sum(by_step[step]) / len(by_step[step]) for step in course.steps]


def _by_difficulty(analysis: Analysis, outcome: Outcome) -> Plot:
    """Each arm on problems of like difficulty, as the arm that chooses the hard ones tells it."""
    chooser = next((one.hard for one in analysis.study.contrasts if one.hard), None)
    lines: list[Line] = []
    choosing = [list(arm.results.values()) for arm in analysis.arms if arm.name == chooser]
    if choosing and choosing[0]:
        solved, samples = solved_by(choosing[0], outcome)
        bins = [(solved >= low) & (solved < high) for low, high in pairwise((0, *_edges(samples)))]
        filled = [number for number, chosen in enumerate(bins) if chosen.any()]
        for place, arm in enumerate(analysis.arms):
            if arm.name == chooser or not arm.results:
                continue
            mean = np.mean([values(one, outcome) for one in arm.results.values()], axis=0)
            y = [float(mean[bins[number]].mean()) for number in filled]
            lines.append(Line(arm.name, series_colour(place), filled, y, dashed=_dashed(place, arm)))
    description = (
        f"{outcome.measure} of problems that {chooser} solved never (0), in below 1% (1), 5% (2), 20% (3) "
        "of its samples, or in more (4). It took no part in the outcomes."
    )
    return Plot(
        "by_difficulty", "where outcomes differ", description, "ease of the problem", "", tuple(lines)
    )


def _edges(samples: int) -> list[float]:
    return [1, *(samples * share for share in (0.01, 0.05, 0.2)), samples + 1]


POSITIONS = {
    "entropy": "entropy by position, nats",
    "reverse_kl": "KL(model ‖ base) by position, nats",
}
FEWEST_REACHING = 20  # responses, for a position to be shown


def _by_position(arms: Sequence[ArmResults], outcome: Outcome) -> Iterator[Plot]:
    """Of correct responses, on the outcome's data."""
    for measure, title in POSITIONS.items():
        lines = []
        for place, arm in enumerate(arms):
            tables = [one.diagnosed.get(judged(one, outcome)[0]) for one in arm.results.values()]
            known = [one for one in tables if one is not None]
            if known:
                mean = mean_by_position(known, measure, FEWEST_REACHING)
                x = list(range(len(mean)))
                lines.append(Line(arm.name, series_colour(place), x, mean, dashed=_dashed(place, arm)))
        yield Plot(
            f"{measure}_by_position",
            title,
            "Of correct responses to held-out problems: the mean over those that reach the position.",
            "token of the response",
            "",
            tuple(lines),
        )


def _sensitivity(analysis: Analysis) -> Iterator[Plot]:
    """For each tuned option with numbers: the best outcome at each of its values, by arm."""
    outcome = Outcome.read(
        (analysis.study.tuning and analysis.study.tuning.outcome) or analysis.study.outcome
    )
    options = dict.fromkeys(
        option for search in analysis.searches.values() for trial in search.tried for option in trial.options
    )
    for option in options:
        lines = []
        for place, (arm, search) in enumerate(analysis.searches.items()):
            best: dict[float, float] = {}
            for trial in search.tried:
                value = trial.options.get(option)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    best[float(value)] = max(best.get(float(value), trial.mean), trial.mean)
            if len(best) > 1:
                x = sorted(best)
                lines.append(Line(arm, series_colour(place), x, [best[value] for value in x]))
        name = option.replace(".", "_")
        description = f"Search: the best {outcome.measure} at each value, over the other tuned options."
        positive = all(value > 0 for line in lines for value in line.x)
        yield Plot(
            f"sensitivity_{name}",
            f"sensitivity to {option}",
            description,
            option,
            "",
            tuple(lines),
            scale="log2" if positive else "linear",
        )


def _dashed(place: int, arm: ArmResults) -> bool:
    """Colours repeat after six; a model as it is is dashed, too."""
    trained = any(one.tokens for one in arm.results.values())
    return not trained or (place // len(SERIES)) % 2 == 1
