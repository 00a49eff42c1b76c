"""The study's answer in words, and what would change it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_rapo.study.added_seeds import AFTERWARDS, FIRST_LOOK
from megatron_rapo.study.analysis import Analysis
from megatron_rapo.study.contrasts import FEWEST_SEEDS, Told
from megatron_rapo.study.correction import together


def answer(analysis: Analysis) -> str:
    """One sentence with the primary contrast's interval."""
    return sentence(analysis.primary, len(analysis.contrasts))


def sentence(told: Told, contrasts: int) -> str:
    """What came of a contrast."""
    what = f"{told.contrast.name} in {told.outcome.measure}"
    if told.difference is None:
        return f"{what}: no answer, since {told.why}."
    found = told.difference
    number = f"{_signed(found.mean)}, 95% interval {_signed(found.low)} to {_signed(found.high)}"
    p_value = f"p = {told.holm:.3f}" if told.holm >= 0.001 else "p < 0.001"
    corrected = f" (Holm, of {contrasts} contrasts)" if contrasts > 1 else ""
    over = f"over {found.seeds} seeds × {found.problems} problems"
    verdict = {
        "higher": f"{told.contrast.arm} is higher",
        "lower": f"{told.contrast.arm} is lower",
        "not told apart": "no difference is found",
        "too few seeds": f"no verdict, since that takes {FEWEST_SEEDS} seeds",
    }[told.verdict]
    return f"{what}: {number}, {over}; {p_value}{corrected}: {verdict}."


def changes(analysis: Analysis) -> list[str]:
    """What would change the answer, a sentence each."""
    return [*analysis.study.changes_the_answer, *_found(analysis)]


def _found(analysis: Analysis) -> Iterator[str]:
    told = analysis.primary
    if (found := told.difference) is not None:
        share = found.seed_share
        yield (
            f"{share:.0%} of the variance of the primary contrast's mean come from its {found.seeds} "
            f"seeds, the rest from its {found.problems} problems: more "
            f"{'seeds' if share > 0.5 else 'problems'} narrow the interval most."
        )
        if found.seeds < FEWEST_SEEDS:
            yield (
                f"With {found.seeds} seeds the interval covers less often than it says (docs/studies.md): "
                f"{FEWEST_SEEDS} would allow for a verdict."
            )
    if left_out := [one for one in analysis.contrasts if one.left_out]:
        for one in left_out:
            seeds = ", ".join(map(str, one.left_out))
            yield f"{one.contrast.name} is without seeds {seeds}, which only one of its arms has finished."
    if analysis.excluded:
        yield (
            f"{len(analysis.excluded)} runs have no result and are left out by rule, whatever they would "
            "have shown: a contrast takes the seeds that both of its arms have."
        )
    if analysis.seen:
        yield (
            f"{analysis.seen} of the problems that were judged are left out by rule, of all arms, as the "
            "search saw them too."
        )
    for arm, search in analysis.searches.items():
        for option in search.at_edge:
            yield (
                f"The search of {arm} chose {option} = {search.chosen.options[option]!r}, "  # type: ignore[union-attr]
                "at the edge of its candidates: further ones may be better."
            )
    if analysis.looks:
        yield (
            f"Seeds were added by {len(analysis.looks)} looks at the primary interval's width, none before "
            f"{FIRST_LOOK} seeds, and {AFTERWARDS} more after it was narrow; where it lay played no part "
            "(docs/studies.md says what this does to its level)."
        )
    if len(analysis.contrasts) > 1:
        yield (
            f"Each interval holds by itself in 95 of 100 studies; all {len(analysis.contrasts)} together "
            f"do at {together(len(analysis.contrasts)):.2%} each, which the table shows as well."
        )
    commits = {one.commit for one in analysis.results}
    if len(commits) > 1:
        yield f"Runs were made by {len(commits)} different commits: {', '.join(sorted(map(str, commits)))}."


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
