"""How the samples of each problem came out, from a few narrow columns of the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError

COUNTED = ("problem", "outcome", "extracted", "truncated", "length")
"""The columns that counts are made of."""


@dataclass(frozen=True)
class Counts:
    """How each problem's samples came out.

    Attributes:
        problems: ids, in the data set's order; the arrays below are `[problems]` int64, in the same order.
        samples: on disk; all the same unless the budget was adaptive or the evaluation is not finished.
        correct, wrong, timeout, crash: by outcome; they add up to `samples`.
        unextracted: wrong ones in which no final answer was found.
        truncated: cut at the length limit.
        tokens: response tokens, over all samples.
    """

    problems: tuple[str, ...]
    samples: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    wrong: npt.NDArray[np.int64]
    timeout: npt.NDArray[np.int64]
    crash: npt.NDArray[np.int64]
    unextracted: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]


def count(samples: pyarrow.Table, problems: Sequence[str]) -> Counts:
    """Counts what `samples` (its `COUNTED` columns) say of each of `problems`, by id."""
    samples = samples.unify_dictionaries()  # parts have dictionaries of their own
    rows = codes(samples["problem"], {name: place for place, name in enumerate(problems)})
    outcomes = codes(samples["outcome"], {outcome.value: i for i, outcome in enumerate(Outcome)})
    chosen = {outcome: outcomes == place for place, outcome in enumerate(Outcome)}

    def by_problem(
        which: npt.NDArray[np.bool_] | None = None, weights: npt.NDArray[np.integer] | None = None
    ) -> npt.NDArray[np.int64]:
        counted = rows if which is None else rows[which]
        return np.bincount(counted, weights, minlength=len(problems)).astype(np.int64)

    return Counts(
        problems=tuple(problems),
        samples=by_problem(),
        correct=by_problem(chosen[Outcome.CORRECT]),
        wrong=by_problem(chosen[Outcome.WRONG]),
        timeout=by_problem(chosen[Outcome.TIMEOUT]),
        crash=by_problem(chosen[Outcome.CRASH]),
        unextracted=by_problem(chosen[Outcome.WRONG] & samples["extracted"].is_null().to_numpy()),
        truncated=by_problem(samples["truncated"].to_numpy()),
        tokens=by_problem(weights=samples["length"].to_numpy()),
    )


def codes(column: pyarrow.ChunkedArray, places: Mapping[str, int]) -> npt.NDArray[np.int64]:
    """Each row's label as its place in `places`; the column's chunks share one dictionary."""
    if column.num_chunks == 0:
        return np.empty(0, dtype=np.int64)
    labels = column.chunk(0).dictionary.to_pylist()
    unknown = set(labels) - places.keys()
    if unknown:
        raise RapoError(f"samples of unknown {sorted(unknown)[:3]}: these parts belong to another evaluation")
    table = np.array([places[label] for label in labels], dtype=np.int64)
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks])
    return table[codes]
