"""Intervals of means over problems: what they hold, and how often they cover a truth that is known."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import astuple
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_rapo.evaluation.interval import (
    estimate,
    estimate_difference,
    estimate_differences,
    estimates,
)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """`tools/bench_intervals.py`, which simulates test sets."""
    path = Path(__file__).parents[2] / "tools/bench_intervals.py"
    spec = importlib.util.spec_from_file_location("bench_intervals", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_it_is_that_of_agresti_and_coull_with_students_quantile() -> None:
    # 8 of 10 solved, and one solved and one not beside them: 9 of 12; t with 10 degrees of freedom is 2.228.
    found = estimate(np.repeat([1.0, 0.0], [8, 2]))
    half = 2.22814 * np.sqrt(0.75 * 0.25 / 12)
    assert found.mean == pytest.approx(0.8)
    assert (found.low, found.high) == pytest.approx((0.75 - half, 1.0), abs=1e-5)
    found = estimate(np.repeat([1.0, 0.0], [5, 5]))
    half = 2.22814 * np.sqrt(0.25 / 12)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)


def test_values_that_are_all_alike_are_no_certainty() -> None:
    """Of 30 problems that are all solved, one in ten may not be solvable: 0.9 ** 30 is 0.04."""
    for value in (0.0, 1.0):
        found = estimate(np.full(30, value))
        assert found.mean == value
        assert 0.08 < found.high - found.low < 0.14
    found = estimate_difference(np.zeros(30))
    assert -found.low == found.high > 0.08


@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7])
def test_equal_differences_have_no_spread_whatever_their_rounding(value: float) -> None:
    """The mean of 30 times 0.1 is not 0.1, that of 30 times 1/8 is: their intervals are alike."""
    found, exact = estimate_difference(np.full(30, value)), estimate_difference(np.full(30, 0.125))
    assert found.high - found.low == pytest.approx(exact.high - exact.low, abs=0.05)


def test_many_small_differences_have_a_narrow_interval() -> None:
    """Differences of 0.05 ± 0.02 on 30 problems leave no doubt that there is one."""
    values = 0.05 + 0.02 * np.sin(np.arange(30))
    assert 0 < estimate_difference(values).low < 0.05
    # One that is large makes the others less telling.
    values[0] = 1.0
    assert estimate_difference(values).low < 0


def test_the_interval_holds_the_mean_and_keeps_within_the_ends() -> None:
    generator = np.random.default_rng(0)
    for problems in (1, 2, 30, 500):
        for values in (*generator.beta(0.1, 0.1, (20, problems)), np.ones(problems), np.zeros(problems)):
            found = estimate(values)
            assert 0 <= found.low <= found.mean <= found.high <= 1
            found = estimate_difference(2 * values - 1)
            assert -1 <= found.low <= found.mean <= found.high <= 1


def test_exchanging_the_models_turns_the_interval_round() -> None:
    values = np.random.default_rng(0).uniform(-0.5, 1, 40)
    there, back = estimate_difference(values), estimate_difference(-values)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_columns_are_estimated_each_by_itself() -> None:
    values = np.random.default_rng(0).random((30, 3))
    for together, alone in ((estimates, estimate), (estimate_differences, estimate_difference)):
        expected = [astuple(alone(column)) for column in values.T]
        assert [astuple(one) for one in together(values)] == [pytest.approx(one) for one in expected]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("of", [estimate, estimate_difference])
def test_what_has_no_interval_is_refused(of) -> None:
    with pytest.raises(ValueError, match="evaluate at least one problem"):
        of(np.array([]))
    with pytest.raises(ValueError, match="are not from"):
        of(np.array([1.1]))


# Where the percentile bootstrap covers least, and where pseudo-problems cost most width. The third number is
# the width, over that of the true deviation, that is put up with.
CELLS = [
    ("pass@1, Beta(0.1, 2)", 30, 1.8),
    ("pass@1, Beta(0.05, 1)", 30, 1.6),
    ("pass@64, Beta(1, 1)", 30, 1.5),
    ("pass@64, Beta(2, 5)", 30, 2.1),
    ("pass@64, Beta(2, 5)", 500, 1.2),
    ("maj@8, Beta(0.3, 0.7)", 30, 1.1),
    ("Δ pass@1 same, Beta(0.3, 0.7)", 30, 2.1),
    ("Δ pass@64 better, Beta(0.1, 2)", 30, 1.3),
    ("Δ pass@64 better, Beta(2, 5)", 30, 3.5),
    ("Δ pass@1 shifted, Beta(0.05, 1)", 100, 1.5),
]


def test_the_interval_covers_the_truth_as_often_as_it_says(bench: ModuleType) -> None:
    quantities = {quantity.name: quantity for quantity in bench.quantities()}
    covered_by_bootstrap = []
    for name, problems, width in CELLS:
        quantity = quantities[name]
        true = bench.truth(quantity, problems=200_000)
        found = bench.measure(quantity, problems, true)
        assert found.covered >= 0.925, name  # of 2,000 data sets: the standard error is 0.005
        assert found.width < width, name
        covered_by_bootstrap.append(
            bench.measure(quantity, problems, true, interval=bench.bootstrap, data_sets=500).covered
        )
    assert min(covered_by_bootstrap) < 0.5  # the simulation finds an interval that does not cover
