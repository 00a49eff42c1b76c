"""The contrasts of a study: differences of arms, paired by seed and problem, and what may be said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rapo.study.correction import LEVEL, holm, together
from megatron_rapo.study.crossed import RESAMPLES, Crossed, crossed
from megatron_rapo.study.outcomes import check_same_problems, judged, values
from megatron_rapo.study.results import Result
from megatron_rapo.study.schema import Contrast, Outcome

Floats = npt.NDArray[np.float64]

FEWEST_SEEDS = 5  # of a verdict: with fewer, equal arms are told apart too often (docs/studies.md)
_ENDS = (-1.0, 1.0)
BySeed = Mapping[int, Result]


@dataclass(frozen=True)
class Told:
    """A contrast and what came of it.

    Attributes:
        outcome: that it is of.
        seeds: those that both arms have.
        left_out: seeds that only one of them has.
        difference: None where fewer than two seeds or problems are left, which `why` tells.
        holm: p, corrected for all contrasts of the study.
        low, high: the interval at the confidence at which those of all contrasts hold together.
        chosen_by: of a hard subset: samples of each problem that none of was correct.
    """

    contrast: Contrast
    outcome: Outcome
    seeds: Sequence[int]
    left_out: Sequence[int]
    difference: Crossed | None
    why: str = ""
    holm: float = 1.0
    low: float = -1.0
    high: float = 1.0
    chosen_by: int = 0

    @property
    def verdict(self) -> str:
        """`higher`, `lower`, or `not told apart`: by the corrected p alone; `too few seeds` for that."""
        if self.difference is not None and self.difference.seeds < FEWEST_SEEDS:
            return "too few seeds"
        if self.difference is None or self.holm > LEVEL:
            return "not told apart"
        return "higher" if self.difference.mean > 0 else "lower"


def tell(
    contrasts: Sequence[Contrast], outcome: str, results: Mapping[str, BySeed], *, seed: int = 0
) -> list[Told]:
    """Every contrast, corrected for their number.

    Those that nothing can be told of still count as contrasts.

    Args:
        contrasts: of the study.
        outcome: of those that name none.
        results: by arm and seed.
        seed: of the bootstrap.

    Raises:
        RapoError: runs were judged on different problems, or an outcome is not among what was measured.
    """
    plain = [_tell(one, Outcome.read(one.outcome or outcome), results, seed) for one in contrasts]
    p_values = [told.difference.p_value if told.difference else 1.0 for told in plain]
    confidence = together(len(contrasts))
    found = []
    for told, corrected in zip(plain, holm(p_values), strict=True):
        low, high = told.difference.at(confidence) if told.difference else _ENDS
        values = {**vars(told), "holm": corrected, "low": max(low, -1.0), "high": min(high, 1.0)}
        found.append(Told(**values))
    return found


def _tell(contrast: Contrast, outcome: Outcome, results: Mapping[str, BySeed], seed: int) -> Told:
    arm, against = results.get(contrast.arm, {}), results.get(contrast.against, {})
    seeds = sorted(set(arm) & set(against))
    left_out = sorted(set(arm) ^ set(against))
    if len(seeds) < 2:
        why = f"both arms have {len(seeds)} finished seeds in common; it takes two"
        return Told(contrast, outcome, seeds, left_out, None, why)
    used = [by_seed[one] for one in seeds for by_seed in (arm, against)]
    check_same_problems(used, outcome)
    differences = np.stack([values(arm[one], outcome) - values(against[one], outcome) for one in seeds])
    chosen_by = 0
    if contrast.hard is not None:
        choosing = list(results.get(contrast.hard, {}).values())
        if not choosing:
            return Told(contrast, outcome, seeds, left_out, None, f"no run of {contrast.hard} is finished")
        check_same_problems([used[0], *choosing], outcome)
        hard, chosen_by = never_solved(choosing, outcome)
        if hard.sum() < 2:
            why = f"{contrast.hard} solved all problems but {int(hard.sum())} in {chosen_by} samples"
            return Told(contrast, outcome, seeds, left_out, None, why, chosen_by=chosen_by)
        differences = differences[:, hard]
    difference = crossed(differences, _ENDS, resamples=RESAMPLES, seed=seed)
    return Told(contrast, outcome, seeds, left_out, difference, chosen_by=chosen_by)


def never_solved(choosing: Sequence[Result], outcome: Outcome) -> tuple[npt.NDArray[np.bool_], int]:
    """`[problems]`, those without a correct sample in any of the runs; and how many samples that were."""
    correct, samples = solved_by(choosing, outcome)
    return correct == 0, samples


def solved_by(runs: Sequence[Result], outcome: Outcome) -> tuple[npt.NDArray[np.int64], int]:
    """`[problems]`, the correct samples of all runs together; and how many samples a problem has at least."""
    parts = [judged(one, outcome)[1] for one in runs]
    correct = np.sum([part.correct for part in parts], axis=0)
    samples = np.sum([part.samples for part in parts], axis=0)
    return correct, int(samples.min())
