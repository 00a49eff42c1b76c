"""pass@k against the enumeration of all subsets, exact fractions, and the chance that it estimates."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from megatron_rapo.evaluation.pass_at_k import pass_at_k


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
