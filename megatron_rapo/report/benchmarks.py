"""Each data set at each setting: every model's scores, its comparison with the base, and the frontier."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.compare import Comparison, compare
from megatron_rapo.evaluation.draws import stored_tries
from megatron_rapo.evaluation.frontier import curve, grid, powers_of_two
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.evaluation.statistics import COLUMNS, Statistics, summarise, summarise_adaptive
from megatron_rapo.evaluation.store import Evaluation
from megatron_rapo.report.contents import Against, Benchmark, Scores
from megatron_rapo.report.drawing import Line, Mark, Plot
from megatron_rapo.report.figures import figure
from megatron_rapo.report.sources import EvaluatedModel, benchmark_name, file_name
from megatron_rapo.report.theme import series_colour

SEED = 0  # of tests and subsets: the same evaluations give the same page
COLUMNS_OF_K = 6  # what a table has room for


def benchmarks_of(models: Sequence[EvaluatedModel], control: Evaluation | None) -> list[Benchmark]:
    """The benchmarks of the base, in its order, each with all models that have it.

    Args:
        models: the base first.
        control: the base, evaluated anew, for the hard subset; None: half of its samples.

    Raises:
        RapoError: evaluations cannot be compared, or one is not finished.
    """
    if not models:
        return []
    base, *others = models
    for model in models:
        _refuse_unfinished(model.evaluation)
    found: dict[tuple[str, str], list[Against]] = {pair: [] for pair in base.evaluation}
    for model in others:
        ks = powers_of_two(min(base.evaluation.manifest.samples, model.evaluation.manifest.samples))
        for comparison in compare(base.evaluation, model.evaluation, ks, control=control, seed=SEED):
            run = model.evaluation.manifest.model.run
            found[comparison.data, comparison.setting].append(Against(model.label, run, comparison))
    return [_benchmark(models, *pair, against) for pair, against in found.items()]


def _refuse_unfinished(evaluation: Evaluation) -> None:
    manifest = evaluation.manifest
    if manifest.finished is None:
        raise RapoError(
            f"{evaluation.directory} is not finished; run its `megatron-rapo evaluate` again, which goes on "
            "where it stopped"
        )


def _benchmark(
    models: Sequence[EvaluatedModel], data: str, setting: str, against: Sequence[Against]
) -> Benchmark:
    evaluation = models[0].evaluation
    by_model = {entry.model: entry.comparison for entry in against}
    scores = [_base_scores(models[0], data, setting, list(by_model.values()))]
    for model in models[1:]:
        if model.label in by_model:
            compared = by_model[model.label]
            scores.append(_scores(model, data, setting, compared.ks, compared.model))
    name = benchmark_name(evaluation, data, setting)
    shown = powers_of_two(min(score.ks[-1] for score in scores))
    figures = [figure(frontier(name, scores, against), large=True)]
    return Benchmark(
        name=name,
        questions={problem.id: problem.question for problem in evaluation.problems(data)},
        figures=tuple(figures),
        shown_k=tuple(reversed(shown[::-1][:: -(-len(shown) // COLUMNS_OF_K)])),
        scores=tuple(scores),
        against=tuple(against),
    )


def _base_scores(model: EvaluatedModel, data: str, setting: str, compared: Sequence[Comparison]) -> Scores:
    """The base's curve as the comparison with most samples has it; computed where there is none."""
    if compared:
        longest = max(compared, key=lambda comparison: comparison.ks[-1])
        return _scores(model, data, setting, longest.ks, longest.base)
    draws = stored_tries(model.evaluation, data, setting).draws()
    ks = grid(draws.most)
    return _scores(model, data, setting, ks, curve(draws, ks))


def _scores(
    model: EvaluatedModel, data: str, setting: str, ks: Sequence[int], estimates: Sequence[Estimate]
) -> Scores:
    manifest = model.evaluation.manifest
    return Scores(
        model=model.label,
        most=manifest.samples,
        stop=manifest.adaptive,
        ks=tuple(ks),
        curve=tuple(estimates),
        statistics=_statistics(model.evaluation, data, setting),
    )


def _statistics(evaluation: Evaluation, data: str, setting: str) -> Statistics:
    store, manifest = evaluation.samples(data, setting), evaluation.manifest
    problems = [problem.id for problem in store.problems]
    if manifest.adaptive is None:
        return summarise(store.read(COLUMNS), problems, [], seed=SEED, majority_ks=[manifest.samples])
    samples = store.read([*COLUMNS, "sample"])
    return summarise_adaptive(samples, problems, [], correct=manifest.adaptive, most=manifest.samples)


def frontier(name: str, scores: Sequence[Scores], against: Sequence[Against]) -> Plot:
    """pass@k over k of all models, the base dashed; marks where models fall behind the base."""
    lines = [
        _line(
            score.model,
            "base" if place == 0 else series_colour(place - 1),
            score.ks,
            score.curve,
            dashed=place == 0,
        )
        for place, score in enumerate(scores)
    ]
    return Plot(
        f"frontier_{file_name(name)}",
        f"pass@k on {name}",
        "Chance that one of k samples is correct, mean over problems, with 95% bands.",
        "k",
        "",
        tuple(lines),
        scale="log2",
        share=True,
        marks=_crossovers(scores, against),
    )


def _crossovers(scores: Sequence[Scores], against: Sequence[Against]) -> tuple[Mark, ...]:
    """A mark in each model's colour; with its name where there are several models."""
    colours = {score.model: series_colour(place) for place, score in enumerate(scores[1:])}
    marks = []
    for each in against:
        if (k := each.comparison.crossover.k) is not None:
            name = f"{each.model}: " if len(against) > 1 else ""
            marks.append(Mark(float(k), f"{name}crossover at k = {k:,}", colours[each.model]))
    return tuple(marks)


def _line(label: str, colour: str, ks: Sequence[int], estimates: Sequence[Estimate], *, dashed: bool) -> Line:
    return Line(
        label,
        colour,
        ks,
        [estimate.mean for estimate in estimates],
        [estimate.low for estimate in estimates],
        [estimate.high for estimate in estimates],
        dashed=dashed,
    )
