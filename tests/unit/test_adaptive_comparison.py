"""Comparisons of adaptive budgets: unbiased, and no discoveries where there is nothing to discover."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.compare import Comparison, compare
from megatron_rapo.evaluation.control import SECOND_HALF
from megatron_rapo.evaluation.draws import Draws, tries
from megatron_rapo.evaluation.exact_test import Budget, p_values
from megatron_rapo.evaluation.ledger import Change, ledger
from tests.unit.stored import store

Outcomes = tuple[int, int]


def stopped(sequence: tuple[int, ...], stop: int | None) -> Outcomes:
    """(correct, drawn), sample by sample."""
    correct = 0
    for drawn, outcome in enumerate(sequence, start=1):
        correct += outcome
        if correct == stop:
            return correct, drawn
    return correct, len(sequence)


def chances(budget: Budget, p: float) -> dict[Outcomes, float]:
    """The probability of each outcome, by all sequences of samples."""
    found: dict[Outcomes, float] = defaultdict(float)
    for sequence in itertools.product([0, 1], repeat=budget.samples):
        found[stopped(sequence, budget.stop)] += p ** sum(sequence) * (1 - p) ** (
            budget.samples - sum(sequence)
        )
    return found


BUDGETS = [
    (Budget(7, 2), Budget(7, 2)),
    (Budget(7), Budget(7, 3)),
    (Budget(6, 1), Budget(6)),
    (Budget(5),) * 2,
]


@pytest.mark.parametrize(("base", "model"), BUDGETS)
def test_a_budgets_outcomes_have_their_probabilities(base: Budget, model: Budget) -> None:
    for budget, p in itertools.product((base, model), (0.1, 0.5, 0.8)):
        outcomes = list(zip(*(array.tolist() for array in budget.outcomes()), strict=True))
        found = dict(zip(outcomes, budget.probabilities(p).tolist(), strict=True))
        assert found == pytest.approx(chances(budget, p))


@pytest.mark.parametrize(("base", "model"), BUDGETS)
def test_p_is_at_most_alpha_with_probability_alpha(base: Budget, model: Budget) -> None:
    pairs = list(itertools.product(chances(base, 0.5), chances(model, 0.5)))
    found = dict(zip(pairs, p_values(base, model, pairs), strict=True))
    assert found[(0, base.samples), (0, model.samples)] == pytest.approx(1)
    levels = sorted(set(found.values()))
    reached = np.zeros(len(levels))
    for p in np.linspace(0.01, 0.99, 99):
        old, new = chances(base, p), chances(model, p)
        mass = np.array([[old[one] * new[two], found[one, two]] for one, two in pairs])
        sizes = np.array([mass[mass[:, 1] <= level, 0].sum() for level in levels])
        assert (sizes <= np.array(levels) * 1.01).all()  # the sup is over a grid
        reached = np.maximum(reached, sizes)
    assert (reached >= np.array(levels) * 0.95).all()  # and it is no larger than it must be


def test_the_ledgers_p_is_the_sum_over_all_that_can_come_out() -> None:
    base, model = Budget(6, 2), Budget(6)
    observed = [((0, 6), (6, 6)), ((2, 2), (0, 6)), ((2, 3), (1, 6)), ((1, 6), (5, 6))]
    correct, drawn = (np.array(column) for column in zip(*(old for old, _ in observed), strict=True))
    entries = ledger(
        ["a", "b", "c", "d"],
        Draws(correct, drawn, 6, 2),
        Draws.fixed(np.array([new[0] for _, new in observed]), np.full(4, 6)),
    )

    def log_likelihood(outcomes: Outcomes, p: float) -> float:
        return sum(count * math.log(q) for count, q in _parts(outcomes, p) if count)

    def ratio(old: Outcomes, new: Outcomes) -> float:
        both = old[0] + new[0], old[1] + new[1]
        apart = sum(log_likelihood(one, one[0] / one[1]) for one in (old, new))
        return apart - log_likelihood(both, both[0] / both[1])

    for entry, (old, new) in zip(entries, observed, strict=True):
        sums = []
        for p in np.linspace(0.005, 0.995, 199):
            first, second = chances(base, p), chances(model, p)
            extreme = [
                first[one] * second[two]
                for one, two in itertools.product(first, second)
                if ratio(one, two) >= ratio(old, new) - 1e-9
            ]
            sums.append(sum(extreme))
        assert entry.p_value == pytest.approx(max(sums), rel=0.002)


def _parts(outcomes: Outcomes, p: float) -> tuple[tuple[int, float], tuple[int, float]]:
    return (outcomes[0], p), (outcomes[1] - outcomes[0], 1 - p)


def sequences(samples: int, failures: int) -> np.ndarray:
    """Every sequence as often as it comes where a sample fails with `failures` to 1."""
    rows = [
        row
        for row in itertools.product([0, 1], repeat=samples)
        for _ in range(failures ** (samples - sum(row)))
    ]
    return np.array(rows, dtype=bool)


@pytest.mark.parametrize("stop", [2, 3])
@pytest.mark.parametrize("other", [None, 2])
def test_curves_and_differences_are_unbiased(tmp_path: Path, stop: int, other: int | None) -> None:
    """A problem for every sequence of samples: the mean over problems is the expectation, exactly."""
    right = sequences(4, failures=3)  # p = 1/4; 256 problems
    generator = np.random.default_rng(0)
    base = store(tmp_path / "base", generator.permutation(right), adaptive=stop)
    model = store(tmp_path / "model", generator.permutation(right), adaptive=other, seed=2)
    [found] = compare(base, model, [1, 2, 4])
    assert found.ks == (1, 2, 3, 4)
    for k, old, new in zip(found.ks, found.base, found.model, strict=True):
        assert old.mean == pytest.approx(1 - 0.75**k, abs=1e-12)
        assert new.mean == pytest.approx(1 - 0.75**k, abs=1e-12)
    assert [test.k for test in found.tests] == [1, 2, 4]
    assert all(abs(test.difference.mean) < 1e-12 for test in found.tests)
    assert min(test.p_value for test in found.tests) > 0.9


N, R, PROBLEMS = 128, 8, 200


def compared(
    path: Path, rates: np.ndarray, gain: float, stops: tuple[int | None, int | None] = (R, R)
) -> Comparison:
    generator = np.random.default_rng(3)
    base, model = (generator.random((len(rates), N)) < (rates + more)[:, None] for more in (0, gain))
    old = store(path / "base", base, adaptive=stops[0])
    [found] = compare(old, store(path / "model", model, adaptive=stops[1], seed=2), [1, 16, N])
    return found


@pytest.mark.parametrize("stops", [(R, R), (None, R), (R, None)])
def test_nothing_is_found_where_nothing_changed(tmp_path: Path, stops: tuple[int | None, int | None]) -> None:
    rates = np.random.default_rng(7).beta(0.2, 1.5, size=PROBLEMS)
    found = compared(tmp_path, rates, 0.0, stops)
    assert not any(entry.significant for entry in found.ledger)
    assert sum(entry.p_value <= 0.05 for entry in found.ledger) <= 0.09 * PROBLEMS
    assert min(test.p_value for test in found.tests) > 0.05
    hard = found.hard
    assert hard is not None and hard.model is not None and hard.comparison is not None
    # Chosen by half of the samples, the base solves some of the hard problems when asked again, and so does
    # an equal model, whose whole budget is not counted for it.
    assert (hard.chosen_by, hard.k, found.control) == (N // 2, N // 2, SECOND_HALF)
    assert len(hard.problems) > 40 and hard.model.mean > 0.05
    assert hard.comparison.difference.low < 0 < hard.comparison.difference.high


def test_false_discoveries_keep_their_level() -> None:
    """Of 3,000 unchanged problems p is at most 0.05 for no more than 5%, at any chance of success."""
    generator = np.random.default_rng(11)
    for rate in (0.01, 0.05, 0.2, 0.6):
        base, model = (generator.random((750, N)) < rate for _ in range(2))
        names = list(map(str, range(750)))
        draws = [_cut(right, stop) for right, stop in ((base, R), (model, 2))]
        entries = ledger(names, *draws)
        share = np.mean([entry.p_value <= 0.05 for entry in entries])
        assert share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 750)


def _cut(right: np.ndarray, stop: int) -> Draws:
    """A real adaptive budget: nothing is there after a problem was done."""
    done = np.cumsum(right, axis=1) >= stop
    there = np.concatenate([np.ones((len(right), 1), dtype=bool), ~done[:, :-1]], axis=1)
    rows, numbers = np.nonzero(there)
    table = pyarrow.table(
        {
            "problem": pyarrow.array([str(row) for row in rows]).dictionary_encode(),
            "sample": numbers,
            "outcome": pyarrow.array(
                ["correct" if one else "wrong" for one in right[there]]
            ).dictionary_encode(),
        }
    )
    return tries(table, [str(row) for row in range(len(right))], right.shape[1], stop).draws()


def test_what_changed_is_found(tmp_path: Path) -> None:
    found = compared(tmp_path, np.zeros(20), 0.2)
    assert {entry.change for entry in found.ledger} == {Change.NEWLY_SOLVED}
    assert all(entry.significant for entry in found.ledger)
    assert found.ledger[0].base == (0, N) and found.ledger[0].model[0] == R
    assert found.tests[0].p_value < 0.001
    assert found.hard is not None and len(found.hard.problems) == 20


def test_one_seed_leaves_no_samples_to_judge_by(tmp_path: Path) -> None:
    right = np.zeros((3, 8), dtype=bool)
    base, model = (store(tmp_path / name, right, adaptive=2) for name in ("base", "model"))
    [found] = compare(base, model, [1])
    assert found.hard is None
    assert "both evaluations have seed 1" in found.control and "--control" in found.control
    [found] = compare(base, model, [1], control=store(tmp_path / "control", right, adaptive=2, seed=3))
    assert found.hard is not None and (found.hard.chosen_by, found.hard.k) == (8, 8)


def test_other_budgets_are_refused(tmp_path: Path) -> None:
    base = store(tmp_path / "base", np.zeros((2, 8), dtype=bool), adaptive=2)
    other = store(tmp_path / "other", np.zeros((2, 6), dtype=bool))
    with pytest.raises(RapoError, match=r"up to 8 and 6 samples .* again with --samples 8"):
        compare(base, other, [1])
