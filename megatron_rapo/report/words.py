"""Numbers and findings in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_rapo.evaluation.compare import Comparison
from megatron_rapo.evaluation.frontier import Crossover, Paired
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.evaluation.ledger import Change, Entry
from megatron_rapo.report.contents import Scores

CHANGES = tuple(Change)


def signed(value: Estimate) -> str:
    """`+0.283 [+0.200, +0.400]`."""
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]".replace("-", "−")


def p_value(value: float) -> str:
    """`p = 0.013`, `p < 0.001`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def verdict(test: Paired) -> str:
    """`better` or `worse` where the test tells model and base apart, else `unsure`."""
    return {"ahead": "better", "behind": "worse", "not told apart": "unsure"}[test.standing]


def standing(model: str, test: Paired, base: Estimate, own: Estimate) -> str:
    """Whether the model is beyond its base at one k, a sentence."""
    claims = {
        "ahead": f"{model} is beyond the base",
        "behind": f"{model} is behind the base",
        "not told apart": f"{model} and the base are not told apart",
    }
    return (
        f"{claims[test.standing]} at k = {test.k:,}: pass@{test.k:,} is {own.mean:.3f} against "
        f"{base.mean:.3f}, a difference of {signed(test.difference)}, {p_value(test.p_value)}."
    )


def crossover_sentence(model: str, comparison: Comparison) -> str:
    """At which k the model is ahead of its base or behind it beyond chance, and where the curves cross."""
    found, last = comparison.crossover, comparison.ks[-1]
    if found.ahead_from is None:
        sentence = f"{model} is at no k up to {last:,} ahead of the base beyond chance"
    elif found.ahead_from == found.ahead_to:
        sentence = f"{model} is ahead of the base beyond chance at k = {found.ahead_from:,} only"
    else:
        sentence = (
            f"{model} is ahead of the base beyond chance from k = {found.ahead_from:,} to {found.ahead_to:,}"
        )
    if found.behind_from is not None:
        sentence += f", and behind it at k = {found.behind_from:,}"
    if found.k is not None:
        sentence += f"; the curves meet at k = {found.k:,} ({_interval(found)})"
    return f"{sentence}."


def crossover_value(comparison: Comparison) -> tuple[str, str, str]:
    """Value, explanation and verdict for the summary."""
    found, last = comparison.crossover, comparison.ks[-1]
    beside = "nowhere ahead beyond chance"
    if found.ahead_from is not None:
        beside = f"ahead beyond chance from k = {found.ahead_from:,} to {found.ahead_to:,}"
    value = "none" if found.k is None else f"k = {found.k:,}"
    if found.k is not None:
        beside = f"{_interval(found)} · {beside}"
    if found.behind_from is not None:
        return value, beside, "worse"
    return value, beside, "better" if (found.ahead_from, found.ahead_to) == (1, last) else "unsure"


def _interval(found: Crossover) -> str:
    low, high = ("beyond" if end is None else f"{end:,}" for end in (found.low, found.high))
    return f"95% interval {low} to {high}"


def ledger_sentence(entries: Sequence[Entry]) -> str:
    """How many problems are newly solved, lost, kept and unsolved."""
    counts, sure = ledger_counts(entries)
    return (
        f"Of {len(entries):,} problems it newly solves {counts[Change.NEWLY_SOLVED]:,} "
        f"({sure[Change.NEWLY_SOLVED]:,} significantly), loses {counts[Change.LOST]:,} "
        f"({sure[Change.LOST]:,} significantly), keeps {counts[Change.KEPT]:,}, and "
        f"leaves {counts[Change.UNSOLVED]:,} unsolved."
    )


def ledger_counts(entries: Sequence[Entry]) -> tuple[Counter[Change], Counter[Change]]:
    """Entries by change: all, and the significant ones."""
    sure = Counter(entry.change for entry in entries if entry.significant)
    return Counter(entry.change for entry in entries), sure


def budget_sentence(score: Scores) -> str:
    """What an adaptive budget saved."""
    whole = score.most * score.statistics.problems
    return (
        f"{score.model} had an adaptive budget: a problem was done with {score.stop} correct samples, and "
        f"{score.statistics.drawn:,} of {whole:,} samples were drawn "
        f"({1 - score.statistics.drawn / whole:.0%} saved). pass@k is unbiased all the same; there is no "
        "maj@N, and the outcomes are those of the samples drawn, of which hard problems have more."
    )


def hard_sentence(comparison: Comparison) -> str:
    """What the model makes of the hard subset, beside the control."""
    hard = comparison.hard
    if hard is None:
        return f"No hard subset: {comparison.control}."
    if hard.control is None or hard.model is None or hard.comparison is None:
        return "The base solves every problem at least once: there is no hard subset."
    return (
        f"On the {len(hard.problems):,} problems of which the base solved 0 of {hard.chosen_by:,} its "
        f"pass@{hard.k:,} is {hard.model.mean:.3f}; the base, asked again, has {hard.control.mean:.3f}: "
        f"a difference of {signed(hard.comparison.difference)}, {p_value(hard.comparison.p_value)}."
    )
