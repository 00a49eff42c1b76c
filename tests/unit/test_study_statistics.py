"""What studies claim, against closed forms and simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from megatron_rapo.study.added_seeds import enough, out_of_reach
from megatron_rapo.study.correction import holm
from megatron_rapo.study.crossed import crossed
from megatron_rapo.study.scaling import power_law
from tools.bench_studies import Cell, coverage, mistakes, until_interval

ENDS = (-1.0, 1.0)


def test_where_seeds_alone_vary_the_interval_is_students_over_seeds() -> None:
    """Many problems that are all alike in a seed: as if there were one value a seed."""
    by_seed = np.array([0.1, 0.3, 0.15, 0.25, 0.2])
    generator = np.random.default_rng(0)
    tiny = generator.normal(0, 1e-6, (5, 4_000))
    found = crossed(by_seed[:, None] + tiny, ENDS)
    low, high = stats.t.interval(0.95, 4, by_seed.mean(), stats.sem(by_seed))
    assert found.low == pytest.approx(low, abs=2e-3)
    assert found.high == pytest.approx(high, abs=2e-3)
    assert found.p_value == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue, rel=0.05)
    assert found.seed_share > 0.99


def test_where_problems_alone_vary_the_interval_is_students_over_problems() -> None:
    by_problem = np.random.default_rng(0).normal(0.05, 0.1, 2_000)
    found = crossed(np.tile(by_problem, (4, 1)), ENDS)
    low, high = stats.t.interval(0.95, 1_999, by_problem.mean(), stats.sem(by_problem))
    assert found.low == pytest.approx(low, rel=0.02)
    assert found.high == pytest.approx(high, rel=0.02)
    assert found.seed_share < 0.01
    assert out_of_reach(found, found.width / 2), "seeds cannot halve it"


def test_values_without_any_difference_are_not_told_apart_and_have_a_width() -> None:
    found = crossed(np.zeros((3, 50)), ENDS)
    assert (found.mean, found.p_value) == (0.0, 1.0)
    assert found.low < 0 < found.high


def test_the_bootstrap_resamples_seeds_and_problems() -> None:
    generator = np.random.default_rng(1)
    values = generator.normal(0, 0.2, (20, 1)) + generator.normal(0, 0.2, (1, 30))
    found = crossed(values / 2, ENDS, resamples=4_000)
    assert found.bootstrap is not None
    width = found.bootstrap[1] - found.bootstrap[0]
    both = np.sqrt(values.mean(1).var() / 20 + values.mean(0).var() / 30) / 2
    assert width == pytest.approx(2 * 1.96 * both, rel=0.1)


@pytest.mark.parametrize(
    ("cell", "least", "most"),
    [
        (Cell(5, 64, seed_deviation=0.5), 0.93, 0.97),
        (Cell(5, 64, seed_deviation=0.5, shift=0.7), 0.92, 0.97),
        (Cell(5, 64, seed_deviation=0.1, k=1, shift=0.7), 0.93, 0.97),
    ],
    ids=str,
)
def test_intervals_cover_the_truth_of_simulated_studies(cell: Cell, least: float, most: float) -> None:
    """500 each; the bar is 93 to 97%, and two standard errors of 500 are 2%. The tool has all cells."""
    assert least - 0.01 <= coverage(cell, 500, bootstrap=False).interval <= most + 0.01


def test_a_bootstrap_of_few_seeds_covers_too_little() -> None:
    """So it is not what verdicts go by."""
    assert coverage(Cell(3, 64, seed_deviation=0.5), 150).bootstrap < 0.88


def test_equal_arms_are_told_apart_at_the_nominal_rate() -> None:
    corrected, plain = mistakes(Cell(5, 64), 400)
    assert corrected <= 0.075
    assert plain > 0.07, "three looks without a correction make more mistakes"


def test_adding_seeds_until_the_interval_is_narrow_keeps_its_level() -> None:
    covered, seeds = until_interval(Cell(5, 64, shift=0.7), 0.09, 150)
    assert covered >= 0.89
    assert 6 < seeds < 40, "it stopped by the rule"


def test_holm_is_that_of_the_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_seed_more_is_run_after_the_interval_is_narrow() -> None:
    assert not enough([(4, 0.01)], 0.02), "before the first look that counts"
    assert not enough([(5, 0.03), (6, 0.019)], 0.02)
    assert enough([(5, 0.03), (6, 0.019), (7, 0.021)], 0.02)


def test_a_power_law_is_found_with_its_interval_over_seeds() -> None:
    exponents = [0.3, 0.34, 0.26]
    runs = {
        seed: [(0.0, 0.1), *((10.0**p, 0.01 * (10.0**p) ** b) for p in (2, 3, 4))]
        for seed, b in enumerate(exponents)
    }
    law = power_law(runs)
    assert law is not None
    low, high = stats.t.interval(0.95, 2, np.mean(exponents), stats.sem(exponents))
    assert (law.exponent, law.low, law.high) == pytest.approx((0.3, low, high))
    assert law.at(1e3) == pytest.approx(0.01 * 1e3**0.3)
    assert law.compute == pytest.approx((1e2, 1e4))
    assert power_law({1: runs[0]}) is None
