"""pass@k over k, of two models on the same problems: curves, where they cross, whether they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_rapo.evaluate.draws import Draws
from megatron_rapo.evaluate.pass_at_k import Estimate, bootstrap_interval

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]

RESAMPLES = 10_000
_BLOCK = 500  # resamples at a time, so that memory does not grow with their number


@dataclass(frozen=True)
class Crossover:
    """Where a model that is ahead at small k falls behind the base.

    Attributes:
        k: the first k at which the model's mean pass@k is not above the base's, after one at which it is;
            None if it never falls behind, or never is ahead.
        low, high: 95% interval of k, from problems drawn anew; None for an end at which there is no crossing.
        share: of resamples in which the curves cross at all. Where it is far from 0 and 1, the data do not
            tell whether they do.
    """

    k: int | None
    low: int | None
    high: int | None
    share: float


@dataclass(frozen=True)
class Paired:
    """The difference of two models' mean pass@k on the same problems.

    Attributes:
        difference: model − base, with its bootstrap interval.
        p_value: of no difference, two-sided, by flipping the signs of the problems' differences.
    """

    k: int
    difference: Estimate
    p_value: float


def grid(samples: int) -> list[int]:
    """k from 1 to N, about eight to an octave, so that a curve is smooth and a crossing found."""
    steps = {round(2 ** (step / 8)) for step in range(8 * samples.bit_length())}
    return sorted({k for k in steps if k <= samples} | {samples})


def powers_of_two(samples: int) -> list[int]:
    """1, 2, 4, … and the number of samples itself."""
    return sorted({2**power for power in range(samples.bit_length())} | {samples})


def curve(draws: Draws, ks: Sequence[int], *, seed: int) -> list[Estimate]:
    """Mean pass@k for each k, at most `draws.most`, with 95% intervals from problems drawn anew."""
    values = _values(draws, ks)
    means = _resampled(values, seed)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    ends = zip(values.mean(axis=0).tolist(), low.tolist(), high.tolist(), strict=True)
    return [Estimate(*estimate) for estimate in ends]


def crossover(base: Draws, model: Draws, ks: Sequence[int], *, seed: int) -> Crossover:
    """Where the model's curve falls to the base's.

    Args:
        base, model: of the same problems in the same order.
        ks: increasing.
    """
    difference = _values(model, ks) - _values(base, ks)
    place = int(_first_crossing(difference.mean(axis=0)[None])[0])
    places = _first_crossing(_resampled(difference, seed))
    crossed = places < len(ks)
    # One without a crossing lies beyond every k.
    low, high = np.quantile(places, [0.025, 0.975], method="nearest")
    return Crossover(
        k=_at(ks, place), low=_at(ks, int(low)), high=_at(ks, int(high)), share=float(crossed.mean())
    )


def paired(base: Draws, model: Draws, k: int, *, seed: int) -> Paired:
    """Whether the models' pass@k differ on problems like these.

    The problems are the observations: under the hypothesis that neither model is better, a problem's
    difference is as likely to have the other sign. Two models without any difference have p = 1.
    """
    difference = model.pass_at_k(k) - base.pass_at_k(k)
    low, high = bootstrap_interval(difference, seed=seed)
    observed = abs(difference.sum())
    generator = np.random.default_rng(seed)
    as_large = 0
    for start in range(0, RESAMPLES, _BLOCK):
        rows = min(_BLOCK, RESAMPLES - start)
        signs = generator.integers(0, 2, size=(rows, len(difference)), dtype=np.int8) * 2 - 1
        as_large += int((np.abs(signs @ difference) >= observed * (1 - 1e-12)).sum())
    return Paired(
        k=k,
        difference=Estimate(float(difference.mean()), low, high),
        p_value=(as_large + 1) / (RESAMPLES + 1),  # the observed signs are one of the flips
    )


def _values(draws: Draws, ks: Sequence[int]) -> Floats:
    """`[problems, ks]` pass@k."""
    return np.stack([draws.pass_at_k(k) for k in ks], axis=1)


def _resampled(values: Floats, seed: int) -> Floats:
    """`[RESAMPLES, ks]`: the means of `values` `[problems, ks]` over problems drawn anew with replacement."""
    problems = len(values)
    generator = np.random.default_rng(seed)
    means = np.empty((RESAMPLES, values.shape[1]))
    for start in range(0, RESAMPLES, _BLOCK):
        stop = min(start + _BLOCK, RESAMPLES)
        weights = generator.multinomial(problems, np.full(problems, 1 / problems), size=stop - start)
        means[start:stop] = weights @ values / problems
    return means


def _first_crossing(differences: Floats) -> Integers:
    """`[rows]`: the first place where a row is not above 0 after one where it is; its length if none."""
    above = np.maximum.accumulate(differences > 0, axis=1)
    fallen = above & (differences <= 0)
    return np.where(fallen.any(axis=1), fallen.argmax(axis=1), differences.shape[1])


def _at(ks: Sequence[int], place: int) -> int | None:
    return ks[place] if place < len(ks) else None
