"""The ledger: which problems a model solves that the base does not, and the other way round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np

from megatron_rapo.evaluation.draws import Draws
from megatron_rapo.evaluation.exact_test import Budget, p_values

FALSE_DISCOVERIES = 0.05  # share of false ones that is put up with among significant entries


class Change(StrEnum):
    """What became of a problem: solved is to have a correct sample at all."""

    NEWLY_SOLVED = "newly solved"
    LOST = "lost"
    KEPT = "kept"
    UNSOLVED = "unsolved"


@dataclass(frozen=True)
class Entry:
    """One problem.

    Attributes:
        problem: its id.
        base, model: (correct, samples) of each.
        p_value: two-sided, that both are correct as often: Fisher's exact test, or where an adaptive budget
            ended the samples, `exact_test`.
        q_value: p after Benjamini and Hochberg's correction over the data set.
        significant: whether q is at most `FALSE_DISCOVERIES`. A newly solved problem that is not may be a
            problem that the base solves as seldom, and was lucky or unlucky.
    """

    problem: str
    base: tuple[int, int]
    model: tuple[int, int]
    change: Change
    p_value: float
    q_value: float

    @property
    def significant(self) -> bool:
        """Whether chance alone would hardly do this."""
        return self.q_value <= FALSE_DISCOVERIES


def ledger(problems: Sequence[str], base: Draws, model: Draws) -> list[Entry]:
    """An entry for each problem, in the problems' order."""
    from scipy.stats import false_discovery_control  # late: it takes a second, which a refusal must not cost

    old, new = (_outcomes(draws) for draws in (base, model))
    values = _p_values(base, model)
    q_values = false_discovery_control(values).tolist()
    return [
        Entry(name, was, now, _change(was[0], now[0]), p, q)
        for name, was, now, p, q in zip(problems, old, new, values, q_values, strict=True)
    ]


def _outcomes(draws: Draws) -> list[tuple[int, int]]:
    """(correct, samples) of each problem."""
    return list(zip(draws.correct.tolist(), draws.samples.tolist(), strict=True))


def _p_values(base: Draws, model: Draws) -> list[float]:
    pairs = list(zip(_outcomes(base), _outcomes(model), strict=True))
    if base.stop is None and model.stop is None:
        return [_fisher(*old, *new) for old, new in pairs]
    alike: defaultdict[tuple[Budget, Budget], list[int]] = defaultdict(list)
    for place, (old, new) in enumerate(pairs):
        alike[_budget(base, old), _budget(model, new)].append(place)
    found = np.empty(len(pairs))
    for budgets, places in alike.items():
        found[places] = p_values(*budgets, [pairs[place] for place in places])
    return found.tolist()


def _budget(draws: Draws, outcome: tuple[int, int]) -> Budget:
    if draws.stop is None or draws.stop > draws.most:
        return Budget(outcome[1])
    return Budget(draws.most, draws.stop)


def _change(base: int, model: int) -> Change:
    if model:
        return Change.KEPT if base else Change.NEWLY_SOLVED
    return Change.LOST if base else Change.UNSOLVED


@lru_cache(maxsize=65536)
def _fisher(base: int, base_samples: int, model: int, model_samples: int) -> float:
    from scipy.stats import fisher_exact

    if base in (0, base_samples) and model * base_samples == base * model_samples:
        return 1.0  # both never, or both always
    table = [[base, base_samples - base], [model, model_samples - model]]
    return float(fisher_exact(table).pvalue)
