"""A model against its base: what is known in closed form, what chance alone does, and what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.compare import compare
from megatron_rapo.evaluation.compare_command import run_compare
from megatron_rapo.evaluation.control import Choice
from megatron_rapo.evaluation.draws import Draws
from megatron_rapo.evaluation.frontier import Crossover, Paired, crossover, curve, grid, paired
from megatron_rapo.evaluation.hard_subset import HardSubset, hard_subset
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.evaluation.ledger import Change, ledger
from megatron_rapo.evaluation.manifest import ModelRecord, SettingRecord
from megatron_rapo.evaluation.pass_at_k import pass_at_k
from tests.unit.stored import store

N = 64


def counts(correct: list[int], samples: int = N) -> Draws:
    return Draws.fixed(np.array(correct), np.full(len(correct), samples))


def hard(choosing: Draws, again: Draws, model: Draws) -> HardSubset:
    """The hard subset of problems 0, 1, …"""
    places = np.flatnonzero(choosing.correct == 0)
    chosen = (Draws.fixed(draws.correct[places], draws.samples[places]) for draws in (again, model))
    return hard_subset(Choice(tuple(map(str, places)), N, *chosen, "other samples"), seed=0)


def test_the_grid_has_both_ends_and_every_power_of_two() -> None:
    assert {1, 2, 4, 8, 16, 32, 64, 100} <= set(grid(100))
    assert grid(1) == [1]
    for samples in (100, 1000, 1024):
        ks = grid(samples)
        assert ks[0] == 1 and ks[-1] == samples and len(ks) < 90
        # No step is larger than about an eighth of an octave.
        assert all(later <= earlier * 2 ** (1 / 8) + 1 for earlier, later in pairwise(ks))


def test_the_curve_is_the_estimators() -> None:
    draws = counts([0, 3, 64, 10])
    estimates = curve(draws, [1, 8, 64])
    for k, estimate in zip([1, 8, 64], estimates, strict=True):
        assert estimate.mean == pytest.approx(pass_at_k(draws.correct, N, k).mean())
        assert estimate.low <= estimate.mean <= estimate.high


def test_the_crossover_is_where_the_curves_meet() -> None:
    # The base solves every problem once in 64 samples: pass@k = k/64. The model solves half of them always.
    base, model = counts([1] * 40), counts([64] * 20 + [0] * 20)
    found = crossover(paired(base, model, list(range(1, N + 1)), seed=0))
    assert found.k == 32
    assert found.low is not None and found.high is not None
    # The model's share of solved problems has the standard error of a proportion.
    assert found.low == pytest.approx(64 * (0.5 - 1.96 * np.sqrt(0.25 / 40)), abs=2)
    assert found.high == pytest.approx(64 * (0.5 + 1.96 * np.sqrt(0.25 / 40)), abs=2)
    assert (found.ahead_from, found.ahead_to) == (1, found.low - 1)
    assert found.behind_from == found.high


@pytest.mark.parametrize(
    ("model", "ahead", "behind"), [([20] * 40, (1, 4), None), ([0] * 40, (None, None), 1)]
)
def test_a_model_that_is_always_or_never_ahead_has_no_crossover(
    model: list[int], ahead: tuple[int | None, int | None], behind: int | None
) -> None:
    ks = [1, 2, 4]  # before both curves reach 1
    found = crossover(paired(counts([10] * 40), counts(model), ks, seed=0))
    assert found == Crossover(None, None, None, *ahead, behind)


def test_a_lead_that_chance_may_have_made_is_no_lead() -> None:
    """Two problems better, one worse, of 30: the curves do not meet, and nothing is said of either model."""
    base, model = counts([10] * 30), counts([10] * 27 + [40, 40, 2])
    tests = paired(base, model, [1, 2], seed=0)
    assert all(test.difference.mean > 0 and test.standing == "not told apart" for test in tests)
    found = crossover(tests)
    assert (found.k, found.ahead_from, found.ahead_to, found.behind_from) == (None, None, None, None)
    assert (found.low, found.high) == (1, None)


def test_models_are_told_apart_where_interval_and_test_agree() -> None:
    few, many = (paired(counts([0] * n), counts([64] * n), [1], seed=0)[0] for n in (5, 10))
    assert few.difference.low > 0 and few.p_value > 0.05  # of 5 signs, 2 of 32 choices are as extreme
    assert (few.standing, many.standing) == ("not told apart", "ahead")
    assert paired(counts([64] * 10), counts([0] * 10), [1], seed=0)[0].standing == "behind"


def test_a_lead_has_no_gaps() -> None:
    def test(k: int, mean: float, p_value: float) -> Paired:
        return Paired(k, Estimate(mean, mean - 0.1, mean + 0.1), p_value)

    tests = [test(1, 0.2, 0.2), test(2, 0.2, 0.01), test(3, 0.2, 0.01), test(4, 0.2, 0.2), test(5, 0.2, 0.01)]
    found = crossover(tests)
    assert (found.ahead_from, found.ahead_to) == (2, 3)


def test_the_paired_test_is_that_of_flipped_signs() -> None:
    # All of 5 differences positive: of 32 choices of signs, 2 are as extreme.
    [result] = paired(counts([0] * 5), counts([64] * 5), [1], seed=0)
    assert result.difference.mean == 1.0
    assert result.p_value == pytest.approx(2 / 32, abs=0.01)
    assert [test.p_value for test in paired(counts([7, 3]), counts([7, 3]), [1, 4], seed=0)] == [1.0, 1.0]


def test_the_ledger_by_hand() -> None:
    base, model = counts([0, 4, 2, 0], samples=4), counts([4, 0, 2, 0], samples=4)
    entries = ledger(["a", "b", "c", "d"], base, model)
    assert [entry.change for entry in entries] == [
        Change.NEWLY_SOLVED,
        Change.LOST,
        Change.KEPT,
        Change.UNSOLVED,
    ]
    # Of C(8, 4) = 70 ways to spread 4 correct samples over both, 2 are as extreme.
    assert [entry.p_value for entry in entries] == pytest.approx([2 / 70, 2 / 70, 1, 1])
    # Benjamini and Hochberg: p times the number of tests by its rank; equals take the larger rank.
    assert [entry.q_value for entry in entries] == pytest.approx([4 / 70, 4 / 70, 1, 1])
    assert not any(entry.significant for entry in entries)
    assert ledger(["a"], *(counts([c], samples=4) for c in (0, 4)))[0].significant


def test_the_ledger_declares_few_changes_where_there_are_none() -> None:
    generator = np.random.default_rng(0)
    rates = generator.uniform(0, 1, size=400)
    base, model = (counts(generator.binomial(N, rates)) for _ in range(2))
    assert sum(entry.significant for entry in ledger([""] * 400, base, model)) <= 2


def test_regression_to_the_mean_is_no_gain() -> None:
    """Base and model are the same: what was chosen for 0 of N is solved again, by both alike."""
    generator = np.random.default_rng(1)
    rates = generator.beta(0.3, 3, size=2000)
    choosing, control, model = (counts(generator.binomial(N, rates)) for _ in range(3))
    honest = hard(choosing, control, model)
    assert honest.control is not None and honest.model is not None and honest.comparison is not None
    assert len(honest.problems) > 200
    assert honest.model.mean > 0.1  # it "solves" what the base "never" did
    assert honest.comparison.difference.low < 0 < honest.comparison.difference.high
    assert honest.comparison.p_value > 0.05
    # Without a control the same model would look like a discovery.
    naive = hard(choosing, choosing, model)
    assert naive.comparison is not None and naive.comparison.p_value < 0.001


def test_without_hard_problems_there_is_nothing_to_compare() -> None:
    found = hard(counts([1]), counts([1]), counts([1]))
    assert (found.problems, found.control, found.comparison) == ((), None, None)


def test_stored_evaluations_are_compared(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    rates = np.array([0.0, 0.1, 0.5, 1.0])[:, None]
    base = store(tmp_path / "base", generator.random((4, N)) < rates)
    model = store(tmp_path / "model", generator.random((4, N)) < rates + 0.3, seed=2)
    [found] = compare(base, model, [1, 4, 128])
    assert (found.data, found.setting, found.ks[-1]) == ("sums", "t1", N)
    assert [test.k for test in found.tests] == [1, 4]
    old, new = (evaluation.samples("sums", "t1").counts() for evaluation in (base, model))
    assert found.tests[0].difference.mean == pytest.approx((new.correct - old.correct).mean() / N)
    assert found.ledger[0].change is Change.NEWLY_SOLVED and found.ledger[0].significant
    assert "p0" in found.hard.problems
    assert found.hard.k == N // 2  # the second half of the base's samples


def test_evaluations_of_one_seed_share_no_sample_number_in_the_hard_subset(tmp_path: Path) -> None:
    """The same weights with the same seeds draw the same samples: early ones choose, late ones judge."""
    correct = np.zeros((2, N), dtype=bool)
    correct[0, N - 1] = True  # never correct in the first half, so it is chosen; and solved in the second
    base = store(tmp_path / "base", correct)
    [found] = compare(base, store(tmp_path / "model", correct), [1])
    assert found.hard.problems == ("p0", "p1")
    assert found.hard.k == N // 2
    assert found.hard.control == found.hard.model
    # A control of another seed chooses for both, and all of their samples judge.
    [found] = compare(
        base,
        store(tmp_path / "again", correct),
        [1],
        control=store(tmp_path / "control", correct, seed=5),
    )
    assert found.hard is not None and found.hard.problems == ("p1",) and found.hard.k == N
    assert found.control == f"{tmp_path / 'base'}; chosen by {tmp_path / 'control'}"


def test_a_control_judges_what_the_base_chose(tmp_path: Path) -> None:
    correct = np.zeros((2, N), dtype=bool)
    correct[0, 3] = True
    base, model = store(tmp_path / "base", correct), store(tmp_path / "model", correct, seed=2)
    [found] = compare(base, model, [1], control=store(tmp_path / "control", ~correct, seed=5))
    assert found.hard is not None and found.hard.control is not None and found.hard.model is not None
    assert (found.hard.problems, found.hard.k) == (("p1",), N)
    assert (found.hard.control.mean, found.hard.model.mean) == (1.0, 0.0)
    assert found.control == str(tmp_path / "control")


NONE = np.zeros((3, 4), dtype=bool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "g"}, "evaluated on different problems: sums is s.jsonl"),
        ({"prompts": {"sums": "q"}}, "differ in the prompts of sums .*evaluate both alike"),
        ({"verifier": {"sums": "integer"}}, "differ in the verifier of sums"),
        ({"code": {"a:b": "1"}}, "differ in the code of a:b, which changed between them"),
        (
            {"settings": (SettingRecord(name="t1", temperature=1.0, max_response_tokens=9),)},
            "differ in setting t1",
        ),
        (
            {"settings": (SettingRecord(name="t2", temperature=2.0, max_response_tokens=8),)},
            "no data set and setting in common",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    base = store(tmp_path / "base", NONE)
    base = type(base)(base.directory, base.manifest.model_copy(update={"code": {"a:b": "0"}}))
    other = store(tmp_path / "other", NONE) if "settings" not in changes else None
    if other is None:
        (tmp_path / "other").mkdir()
        name = changes["settings"][0].name  # type: ignore[index]
        other = store(tmp_path / "other", NONE)
        (tmp_path / "other" / "sums" / "t1").rename(tmp_path / "other" / "sums" / name)
    other = type(other)(other.directory, other.manifest.model_copy(update=_as_manifest(other, changes)))
    with pytest.raises(RapoError, match=message):
        compare(base, other, [1])


def _as_manifest(other: object, changes: dict[str, object]) -> dict[str, object]:
    if "fingerprint" not in changes:
        return changes
    data = other.manifest.data  # type: ignore[attr-defined]
    return {"data": tuple(record.model_copy(update=changes) for record in data)}


@pytest.mark.parametrize(
    ("days", "told"),
    [
        (("2026-01-01", "2026-01-02"), r" \(--set run.date=2026-01-01, for the day\)$"),
        (("2026-01-01", "2026-01-01"), "evaluate both alike$"),
        ((None, "2026-01-01"), "evaluate both alike$"),
    ],
)
def test_prompts_of_another_day_are_refused_with_the_day(
    tmp_path: Path, days: tuple[str | None, str], told: str
) -> None:
    base, other = store(tmp_path / "base", NONE), store(tmp_path / "other", NONE)
    changes: list[dict[str, object]] = [{"date": days[0]}, {"date": days[1], "prompts": {"sums": "q"}}]
    one, two = (
        type(found)(found.directory, found.manifest.model_copy(update=change))
        for found, change in zip((base, other), changes, strict=True)
    )
    with pytest.raises(RapoError, match=told):
        compare(one, two, [1])


def test_one_sample_a_problem_is_enough_to_compare(tmp_path: Path) -> None:
    right = np.array([[True], [False], [True]])
    base, model = store(tmp_path / "base", ~right), store(tmp_path / "model", right, seed=2)
    [found] = compare(base, model, [1])
    assert found.ks == (1,)
    assert found.tests[0].difference.mean == pytest.approx(1 / 3)


def test_what_is_no_control_is_refused(tmp_path: Path) -> None:
    base, model = store(tmp_path / "base", NONE), store(tmp_path / "model", NONE, seed=2)
    with pytest.raises(RapoError, match=r"has the seed of .* and no control"):
        compare(base, model, [1], control=store(tmp_path / "same", NONE))
    other = store(tmp_path / "other", NONE, seed=3, model=ModelRecord(path="x", fingerprint="v"))
    with pytest.raises(RapoError, match="is of other weights"):
        compare(base, model, [1], control=other)


def test_of_a_run_the_newest_evaluation_is_compared_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    store(base, np.zeros((3, 4), dtype=bool))
    for step, right in ((999_999, False), (1_000_000, True)):
        directory = run / f"evaluations/step_{step:06d}"
        model = ModelRecord(path=str(run), run=str(run), step=step)
        store(directory, np.full((3, 4), right), model=model)
    assert run_compare(base, run, None, [1], None, None) == 0
    newest = run / "evaluations/step_1000000"
    assert f"{run} is a run; its newest finished evaluation is {newest}\n" in capsys.readouterr().out
    assert (newest / "comparison/comparison.json").exists()
    with pytest.raises(RapoError, match="is no evaluation"):
        run_compare(base, tmp_path, None, [1], None, None)
