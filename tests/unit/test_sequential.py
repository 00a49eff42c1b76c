"""Sampling that stops at the r-th success: unbiased, intervals that cover, and what it saves."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.draws import tries
from megatron_rapo.evaluation.interval import estimate
from megatron_rapo.evaluation.pass_at_k import pass_at_k
from megatron_rapo.evaluation.sequential import Stopping, sequential_pass_at_k
from megatron_rapo.evaluation.statistics import COLUMNS, summarise_adaptive
from tests.unit.stored import store


def stop(right: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
    """(correct, drawn) of `[problems, N]` outcomes, sample by sample."""
    found = []
    for line in right:
        correct = drawn = 0
        for outcome in line:
            drawn, correct = drawn + 1, correct + int(outcome)
            if correct == r:
                break
        found.append((correct, drawn))
    return tuple(np.array(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize("r", [1, 2, 3])
@pytest.mark.parametrize("p", [Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)])
def test_it_is_unbiased_over_all_outcomes(r: int, p: Fraction) -> None:
    """The expectation over all 2^N sequences, weighted exactly, is 1 − (1 − p)^k for every k."""
    most = 8
    sequences = np.array(list(itertools.product([0, 1], repeat=most)), dtype=bool)
    weights = np.array([float(p ** int(s.sum()) * (1 - p) ** int(most - s.sum())) for s in sequences])
    stops = stop(sequences, r)
    for k in range(1, most + 1):
        expected = float(1 - (1 - p) ** k)
        assert weights @ sequential_pass_at_k(stops, r, k) == pytest.approx(expected, abs=1e-12)
    naive = weights @ (stops[0] / stops[1])
    assert naive > float(p) + 1e-3  # the plain share is not


def test_intervals_cover_as_often_and_are_as_wide_as_those_of_the_whole_budget() -> None:
    generator = np.random.default_rng(0)
    problems, most, r, rounds = 200, 256, 16, 150
    covered, widths, spent = 0, [], 0
    truth = 0.5 / (0.5 + 0.7)
    for _ in range(rounds):
        rates = generator.beta(0.5, 0.7, size=problems)
        right = generator.random((problems, most)) < rates[:, None]
        reached = np.cumsum(right, axis=1) >= r
        drawn = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, most)
        stops = (np.minimum(right.sum(axis=1), r), drawn)
        found = estimate(sequential_pass_at_k(stops, r, 1))
        whole = estimate(pass_at_k(right.sum(axis=1), most, 1))
        covered += found.low <= truth <= found.high
        widths.append((found.high - found.low) / (whole.high - whole.low))
        spent += int(drawn.sum())
    assert 0.89 <= covered / rounds <= 0.99
    assert np.mean(widths) < 1.05
    assert spent < 0.5 * problems * most * rounds


def test_where_stored_sampling_stopped(tmp_path: Path) -> None:
    right = np.zeros((3, 6), dtype=bool)
    right[0, [1, 3, 5]] = True  # stops at sample 3; what came after is left out
    right[1, 4] = True
    samples = store(tmp_path, right).samples("sums", "t1").read(["problem", "sample", "outcome"])
    draws = tries(samples, ["p0", "p1", "p2"], 6, 2).draws()
    assert (draws.correct.tolist(), draws.samples.tolist(), draws.most) == ([2, 1, 0], [4, 6, 6], 6)
    with pytest.raises(RapoError, match=r"problem p1 is still open: it has neither 2 correct samples nor 7"):
        tries(samples, ["p0", "p1", "p2"], 7, 2).draws()


def test_a_problem_is_open_until_its_successes_come_without_a_gap() -> None:
    stopping = Stopping(2)
    stopping.take("a", 2, True)
    stopping.take("a", 3, True)
    assert stopping.is_open("a")
    stopping.take("a", 1, False)
    stopping.take("a", 0, False)
    assert not stopping.is_open("a")
    assert stopping.is_open("b")


def test_the_largest_k_is_the_budgets(tmp_path: Path) -> None:
    right = np.zeros((2, 6), dtype=bool)
    right[0, [1, 3]] = True
    samples = store(tmp_path, right).samples("sums", "t1").read([*COLUMNS, "sample"])
    found = summarise_adaptive(samples, ["p0", "p1"], [1, 6], correct=2, most=6)
    assert found.pass_at_k[6].mean == 0.5
    assert found.mean == found.pass_at_k[1]
    assert found.mean.mean == pytest.approx((1 / 3 + 0) / 2)  # 1 of the 3 before the one that ended it
    with pytest.raises(RapoError, match="k = 7 needs as many samples, but 6 were the most"):
        summarise_adaptive(samples, ["p0", "p1"], [1, 7], correct=2, most=6)
