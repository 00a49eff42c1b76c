"""pass@k over k, of two models on the same problems: curves, where they cross, whether they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_rapo.evaluation.draws import Draws
from megatron_rapo.evaluation.interval import Estimate, estimate_differences, estimates

Floats = npt.NDArray[np.float64]
Standing = Literal["ahead", "behind", "not told apart"]

FLIPS = 10_000
SIGNIFICANT = 0.05
_PER_OCTAVE = 8  # ks of a curve
_BLOCK = 500  # flips at a time, so that memory does not grow with their number


@dataclass(frozen=True)
class Paired:
    """The difference of two models' mean pass@k on the same problems.

    Attributes:
        difference: model − base, with its interval.
        p_value: of no difference, two-sided, by flipping the signs of the problems' differences.
    """

    k: int
    difference: Estimate
    p_value: float

    @property
    def standing(self) -> Standing:
        """The model beside the base; they are told apart where interval and test agree that they are."""
        if self.p_value > SIGNIFICANT or self.difference.low <= 0 <= self.difference.high:
            return "not told apart"
        return "ahead" if self.difference.low > 0 else "behind"


@dataclass(frozen=True)
class Crossover:
    """Where a model that is ahead at small k falls behind the base.

    Attributes:
        k: the first k at which the model's mean pass@k is not above the base's, after one at which it is;
            None if it never falls behind, or never is ahead.
        low, high: 95% interval of k: at every k before `low` the model is ahead beyond chance, and at `high`
            it is first not ahead beyond chance; None for an end beyond the largest k. Both are None where no
            crossing can be, too.
        ahead_from, ahead_to: the first k at which the model is ahead beyond chance, and the last from there
            on without a gap; None if there is none.
        behind_from: the first k at which it is behind beyond chance; None if there is none.
    """

    k: int | None
    low: int | None
    high: int | None
    ahead_from: int | None
    ahead_to: int | None
    behind_from: int | None


def grid(samples: int) -> list[int]:
    """k from 1 to N, about eight to an octave, so that a curve is smooth and a crossing found."""
    steps = {round(2 ** (step / _PER_OCTAVE)) for step in range(_PER_OCTAVE * samples.bit_length())}
    return sorted({k for k in steps if k <= samples} | {samples})


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, … and the number of samples itself."""
    return sorted({2**power for power in range(samples.bit_length())} | {samples})


def curve(draws: Draws, ks: Sequence[int]) -> list[Estimate]:
    """Mean pass@k for each k, at most `draws.most`."""
    return estimates(_values(draws, ks))


def paired(base: Draws, model: Draws, ks: Sequence[int], *, seed: int) -> list[Paired]:
    """Whether the models' pass@k differ on problems like these, at each k.

    The problems are the observations: under the hypothesis that neither model is better, a problem's
    difference is as likely to have the other sign. Two models without any difference have p = 1.

    Args:
        base, model: of the same problems in the same order.
        ks: at most `most` of both.
        seed: of the flips.
    """
    differences = _values(model, ks) - _values(base, ks)
    observed = np.abs(differences.sum(axis=0)) * (1 - 1e-12)
    generator = np.random.default_rng(seed)
    as_large = np.ones(len(ks))  # the observed signs are one of the flips
    for start in range(0, FLIPS, _BLOCK):
        rows = min(_BLOCK, FLIPS - start)
        signs = generator.integers(0, 2, size=(rows, len(differences)), dtype=np.int8) * 2.0 - 1.0
        as_large += (np.abs(signs @ differences) >= observed).sum(axis=0)
    p_values = (as_large / (FLIPS + 1)).tolist()
    return [Paired(*one) for one in zip(ks, estimate_differences(differences), p_values, strict=True)]


def crossover(tests: Sequence[Paired]) -> Crossover:
    """Where the model's curve falls to the base's: the tests at increasing k, from 1 on.

    At the true crossing the true difference is 0, and its interval there holds 0 in 95 of 100 cases: the
    interval of k is where that is so.
    """
    ks = [test.k for test in tests]
    above = [test.difference.mean > 0 for test in tests]
    from_there = dropwhile(lambda test: test.standing != "ahead", tests)
    ahead = [test.k for test in takewhile(lambda test: test.standing == "ahead", from_there)]
    possibly = [test.difference.high > 0 for test in tests]
    return Crossover(
        k=_first(ks, [not now for now in above], after=above),
        low=_first(ks, [test.standing != "ahead" for test in tests], after=possibly, at_once=True),
        high=_first(ks, [not now for now in possibly], after=possibly),
        ahead_from=ahead[0] if ahead else None,
        ahead_to=ahead[-1] if ahead else None,
        behind_from=next((test.k for test in tests if test.standing == "behind"), None),
    )


def _first(
    ks: Sequence[int], wanted: Sequence[bool], *, after: Sequence[bool], at_once: bool = False
) -> int | None:
    """The first k at which `wanted` holds, after one at which `after` does (`at_once`: or there)."""
    if True not in after:
        return None
    start = after.index(True) + (not at_once)
    return next((k for k, now in zip(ks[start:], wanted[start:], strict=True) if now), None)


def _values(draws: Draws, ks: Sequence[int]) -> Floats:
    """`[problems, ks]` pass@k."""
    return np.stack([draws.pass_at_k(k) for k in ks], axis=1)
