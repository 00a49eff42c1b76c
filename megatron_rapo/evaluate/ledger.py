"""The ledger: which problems a model solves that the base does not, and the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control, fisher_exact

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
        p_value: Fisher's exact test, two-sided, that both are correct as often.
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


def ledger(
    problems: Sequence[str],
    base: tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]],
    model: tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]],
) -> list[Entry]:
    """An entry for each problem, in the problems' order.

    Args:
        problems: ids.
        base, model: (correct, samples), each `[problems]`.
    """
    rows = list(zip(*(array.tolist() for array in (*base, *model)), strict=True))
    p_values = np.array([_p_value(*row) for row in rows])
    q_values = false_discovery_control(p_values).tolist()
    return [
        Entry(name, (bc, bn), (mc, mn), _change(bc, mc), p, q)
        for name, (bc, bn, mc, mn), p, q in zip(problems, rows, p_values.tolist(), q_values, strict=True)
    ]


def _change(base: int, model: int) -> Change:
    if model:
        return Change.KEPT if base else Change.NEWLY_SOLVED
    return Change.LOST if base else Change.UNSOLVED


@lru_cache(maxsize=65536)
def _p_value(base: int, base_samples: int, model: int, model_samples: int) -> float:
    if base in (0, base_samples) and model * base_samples == base * model_samples:
        return 1.0  # both never, or both always
    table = [[base, base_samples - base], [model, model_samples - model]]
    return float(fisher_exact(table).pvalue)
