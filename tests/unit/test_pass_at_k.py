"""pass@k against the enumeration of all subsets, exact fractions, and the distribution it estimates."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from megatron_rapo.evaluate.pass_at_k import bootstrap_interval, mean_pass_at_k, pass_at_k


def test_it_is_the_share_of_subsets_with_a_correct_sample() -> None:
    for samples in range(1, 9):
        for k in range(1, samples + 1):
            subsets = list(combinations(range(samples), k))
            # Sample i is correct where i < c: a subset solves the problem where its least index does.
            shares = [sum(min(subset) < c for subset in subsets) / len(subsets) for c in range(samples + 1)]
            np.testing.assert_allclose(pass_at_k(np.arange(samples + 1), samples, k), shares, rtol=1e-14)


def test_a_correct_sample_among_all_is_found() -> None:
    # 1 − (1 − c/N)^k says 0.68.
    assert pass_at_k(np.array([1]), samples=4, k=4) == [1.0]


def test_it_is_unbiased() -> None:
    solve_rate, samples, k = Fraction(1, 3), 5, 3
    estimates = pass_at_k(np.arange(samples + 1), samples, k)
    chances = [
        comb(samples, c) * solve_rate**c * (1 - solve_rate) ** (samples - c) for c in range(samples + 1)
    ]
    expected = sum(float(chance) * estimate for chance, estimate in zip(chances, estimates, strict=True))
    assert expected == pytest.approx(float(1 - (1 - solve_rate) ** k), rel=1e-14)


@pytest.mark.parametrize("k", [1, 2, 16, 1024, 4095, 4096])
def test_it_is_exact_for_many_samples(k: int) -> None:
    samples = 4096
    counts = np.array([0, 1, 2, 3, 10, 100, 2048, 4000, 4094, 4095, 4096])
    exact = [float(1 - Fraction(comb(samples - c, k), comb(samples, k))) for c in counts.tolist()]
    np.testing.assert_allclose(pass_at_k(counts, samples, k), exact, rtol=1e-11, atol=0)


@pytest.mark.parametrize(("samples", "k"), [(4, 0), (4, 5), (0, 1)])
def test_an_impossible_k_is_refused(samples: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"k = {k} is not from 1 to the {samples} samples"):
        pass_at_k(np.array([0]), samples, k)


@pytest.mark.parametrize("count", [-1, 5])
def test_an_impossible_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="is not from 0 to 4 samples"):
        pass_at_k(np.array([2, count]), samples=4, k=1)


# The interval


def test_the_interval_is_that_of_the_binomial() -> None:
    """Values 0 and 1: the resampled sum is Binomial(n, mean), whose quantiles are known exactly."""
    values = np.repeat([0.0, 1.0], [60, 40])
    low, high = bootstrap_interval(values, seed=0)
    cumulated = np.cumsum([comb(100, x) * 0.4**x * 0.6 ** (100 - x) for x in range(101)])
    expected = [float(np.searchsorted(cumulated, tail)) / 100 for tail in (0.025, 0.975)]
    assert [low, high] == pytest.approx(expected, abs=0.01)


def test_problems_are_drawn_and_not_samples() -> None:
    """One problem always solved, one never: the samples of 2 problems say nothing on a third."""
    estimate = mean_pass_at_k(np.array([0, 1000]), samples=1000, k=1, seed=0)
    assert (estimate.mean, estimate.low, estimate.high) == (0.5, 0.0, 1.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    solve_rates = generator.beta(0.5, 0.5, size=(400, 50))  # their mean is 0.5
    covered = 0
    for rates in solve_rates:
        estimate = mean_pass_at_k(generator.binomial(8, rates), samples=8, k=1, seed=0, resamples=500)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.90 <= covered / 400 <= 0.98


def test_the_seed_decides_the_interval() -> None:
    values = np.random.default_rng(1).random(30)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_large_test_sets_are_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(30)
    whole = bootstrap_interval(values, seed=3)
    monkeypatch.setattr("megatron_rapo.evaluate.pass_at_k._BLOCK", 1000)
    np.testing.assert_allclose(bootstrap_interval(values, seed=3), whole, atol=0.01)


def test_confidence_widens_the_interval() -> None:
    values = np.random.default_rng(1).random(30)
    narrow, wide = (bootstrap_interval(values, seed=3, confidence=c) for c in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_no_problems_have_no_interval() -> None:
    with pytest.raises(ValueError, match="evaluate at least one problem"):
        bootstrap_interval(np.array([]), seed=0)
