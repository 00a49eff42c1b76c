"""maj@k against all subsets, and a summary against its rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.evaluator import _as_metrics
from megatron_rapo.evaluation.majority import majority_at_k
from megatron_rapo.evaluation.results import Result, table
from megatron_rapo.evaluation.statistics import COLUMNS, summarise
from tests.unit.stored import store


def by_all_subsets(votes: list[int], k: int) -> float:
    total = 0.0
    subsets = list(combinations(votes, k))
    for subset in subsets:
        tally = Counter(vote for vote in subset if vote != -1)
        if tally:
            leaders = [vote for vote, number in tally.items() if number == max(tally.values())]
            total += (0 in leaders) / len(leaders)
    return total / len(subsets)


@pytest.mark.parametrize(
    "votes", [[0, 0, 1, 2, 3, 1], [-1, -1, -1, 0, 1, 1], [0] * 6, [-1] * 6, [1, 2, 3, 4, 5, 0]]
)
def test_the_majority_is_that_of_all_subsets_on_average(votes: list[int]) -> None:
    found = majority_at_k(np.array(votes), range(1, 7), np.random.default_rng(0))
    for k in range(1, 7):
        assert found[k] == pytest.approx(by_all_subsets(votes, k), abs=1e-9 if k == 6 else 0.09)


def test_a_majority_of_more_samples_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="from 1 to the 2 samples"):
        majority_at_k(np.array([0, 1]), [3], np.random.default_rng(0))


def test_the_summary_of_stored_samples(tmp_path: Path) -> None:
    correct = np.random.default_rng(0).random((5, 8)) < np.array([0, 0.2, 0.5, 0.9, 1])[:, None]
    samples = store(tmp_path, correct).samples("sums", "t1")
    ids = [problem.id for problem in samples.problems]
    found = summarise(samples.read(COLUMNS), ids, [1, 8], seed=0)
    assert (found.problems, found.samples) == (5, (8, 8))
    assert found.mean.mean == found.pass_at_k[1].mean == pytest.approx(correct.mean())
    assert found.pass_at_k[8].mean == pytest.approx(correct.any(axis=1).mean())
    # All wrong samples of the store give the same answer, so the majority is a plain one.
    share = correct.mean(axis=1)
    expected = np.where(share == 0.5, 0.5, share > 0.5).mean()
    assert found.majority_at_k[8].mean == pytest.approx(expected)
    assert found.outcomes["correct"] == pytest.approx(correct.mean())
    assert (found.unextracted, found.truncated, found.lengths.longest) == (0, 0, 1)


def test_what_could_not_be_verified_is_told(tmp_path: Path) -> None:
    samples = store(tmp_path, np.zeros((2, 4), dtype=bool)).samples("sums", "t1")
    found = summarise(samples.read(COLUMNS), [problem.id for problem in samples.problems], [1], seed=0)
    assert found.unknown == 0
    assert "could not be verified" not in table([Result("sums", "t1", found)])
    shares = {Outcome.CORRECT: 0.0, Outcome.WRONG: 0.875, Outcome.TIMEOUT: 0.1, Outcome.CRASH: 0.025}
    damaged = replace(found, outcomes=shares)
    assert damaged.unknown == pytest.approx(0.125)
    told = "12.50% of the samples could not be verified (timeout or crash); they count as not correct"
    assert told in table([Result("sums", "t1", damaged)])
    assert _as_metrics(damaged, graded=False)["unknown"] == damaged.unknown


def test_fewer_samples_than_k_are_refused(tmp_path: Path) -> None:
    samples = store(tmp_path, np.zeros((3, 4), dtype=bool)).samples("sums", "t1")
    ids = [problem.id for problem in samples.problems]
    with pytest.raises(RapoError, match=r"k = 5 needs as many samples .* problem p0 has 4"):
        summarise(samples.read(COLUMNS), ids, [1, 5], seed=0)
