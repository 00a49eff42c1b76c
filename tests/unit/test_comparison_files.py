"""A comparison's files and lines, against the comparison that they tell of."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import comparison_files, diagnosis
from megatron_rapo.evaluation.compare import Comparison, compare
from megatron_rapo.evaluation.compare_command import run_compare
from megatron_rapo.evaluation.frontier import Crossover, Paired
from megatron_rapo.evaluation.hard_subset import HardSubset
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.evaluation.ledger import Change, Entry
from megatron_rapo.evaluation.manifest import ModelRecord
from tests.unit.stored import store


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_the_files_hold_what_was_compared(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rates = np.array([0.0, 0.1, 0.5, 1.0, 0.3])[:, None]
    base = store(tmp_path / "base", generator.random((5, 8)) < rates)
    model = store(tmp_path / "model", generator.random((5, 8)) < rates + 0.3, seed=2)
    found = compare(base, model, [1, 4])
    comparison_files.write(found, tmp_path / "new/out")
    [one] = found

    [read] = json.loads((tmp_path / "new/out/comparison.json").read_text())
    assert (read["data"], read["setting"], tuple(read["ks"])) == ("sums", "t1", one.ks)
    assert [test["p_value"] for test in read["tests"]] == [test.p_value for test in one.tests]
    assert read["hard"]["problems"] == list(one.hard.problems)

    points = {(r["model"], int(r["k"])): r for r in rows(tmp_path / "new/out/frontier.csv")}
    assert len(points) == 2 * len(one.ks)
    for name, curve in (("base", one.base), ("model", one.model)):
        for k, point in zip(one.ks, curve, strict=True):
            row = points[name, k]
            assert (row["data"], row["setting"]) == ("sums", "t1")
            numbers = [float(row[column]) for column in ("pass@k", "low", "high")]
            assert numbers == [point.mean, point.low, point.high]

    entries = rows(tmp_path / "new/out/ledger.csv")
    assert len(entries) == 5
    for row, entry in zip(entries, one.ledger, strict=True):
        assert row == {
            "data": "sums",
            "setting": "t1",
            "problem": entry.problem,
            "change": entry.change.value,
            "base_correct": str(entry.base[0]),
            "base_samples": "8",
            "model_correct": str(entry.model[0]),
            "model_samples": "8",
            "p": str(entry.p_value),
            "q": str(entry.q_value),
            "significant": str(entry.significant),
        }


def estimate(mean: float) -> Estimate:
    return Estimate(mean, mean - 0.125, mean + 0.125)


def entry(change: Change, q_value: float) -> Entry:
    return Entry("p", (0, 8), (1, 8), change, q_value / 2, q_value)


COMPARISON = Comparison(
    data="sums",
    setting="t1",
    ks=(1, 2),
    base=(estimate(0.25), estimate(0.5)),
    model=(estimate(0.375), estimate(0.4375)),
    crossover=Crossover(2, 1, None, 1, 1, None),
    tests=(
        Paired(1, estimate(0.1875), 0.0123),
        Paired(2, estimate(-0.0625), 0.5),
        Paired(3, estimate(-0.25), 0.05),
    ),
    ledger=(
        *(entry(Change.NEWLY_SOLVED, q) for q in (0.05, 0.01, 0.06)),
        *(entry(Change.LOST, q) for q in (0.04, 0.4)),
        entry(Change.UNSOLVED, 1.0),
    ),
    hard=HardSubset(("p", "q"), 4, 5, estimate(0.25), estimate(0.5), Paired(5, estimate(0.25), 0.125)),
    control="the second half",
)


def test_the_lines_by_hand() -> None:
    assert comparison_files.describe(COMPARISON).splitlines() == [
        "sums t1 · 6 problems",
        "  pass@1: base 0.250, model 0.375, difference +0.188 [+0.062, +0.312], p = 0.012: ahead",
        "  pass@2: base 0.500, model 0.438, difference -0.062 [-0.188, +0.062], p = 0.5: not told apart",
        "  pass@3: difference -0.250 [-0.375, -0.125], p = 0.05: behind",
        "  crossover: k = 2 [1, beyond]; beyond chance ahead from k = 1 to 1, behind nowhere",
        "  ledger: 3 newly solved (2 significantly), 2 lost (1 significantly), 0 kept (0 significantly), "
        "1 unsolved (0 significantly)",
        "  hard subset: 2 problems with 0 of 4 by the base; pass@5 there: base again 0.250, model 0.500, "
        "difference +0.250 [+0.125, +0.375], p = 0.12 (control: the second half)",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"hard": None, "control": "there is none"}, "  hard subset: none, as there is none"),
        (
            {"hard": HardSubset((), 4, 0, None, None, None)},
            "  hard subset: the base solved every problem",
        ),
        (
            {"crossover": Crossover(None, None, None, None, None, 2)},
            "  crossover: none; beyond chance ahead nowhere, behind at k = 2",
        ),
        (
            {"crossover": Crossover(2, None, 3, None, None, None)},
            "  crossover: k = 2 [beyond, 3]; beyond chance ahead nowhere, behind nowhere",
        ),
    ],
)
def test_what_is_missing_is_told(changes: dict[str, Any], line: str) -> None:
    assert line in comparison_files.describe(replace(COMPARISON, **changes)).splitlines()


@pytest.mark.parametrize("diagnosed", [None, 7])
def test_the_command_writes_beside_the_model_and_tells_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    diagnosed: int | None,
) -> None:
    """By default at the powers of two that both evaluations have samples for."""

    def diagnose(base: Any, model: Any, *, limit: int, directory: Path) -> str:
        return f"{base.directory.name} {model.directory.name} {limit} {directory}"

    monkeypatch.setattr(diagnosis, "run", diagnose)
    right = np.random.default_rng(0).random((3, 16)) < 0.5
    store(tmp_path / "base", right)
    store(tmp_path / "model", right[:, :8], seed=2)
    store(tmp_path / "control", right, seed=3)
    directories = tmp_path / "base", tmp_path / "model", tmp_path / "control"
    assert run_compare(*directories, None, diagnosed, None) == 0
    out = tmp_path / "model/comparison"
    [found] = json.loads((out / "comparison.json").read_text())
    assert [test["k"] for test in found["tests"]] == [1, 2, 4, 8]
    assert found["control"] == str(tmp_path / "control")
    said = capsys.readouterr().out
    assert said.startswith("model against base\n\nsums t1 · 3 problems\n")
    files = "comparison.json, frontier.csv, ledger.csv"
    if diagnosed is None:
        assert said.endswith(f"\n{out}  {files}\n")
    else:
        assert said.endswith(f"\nbase model 7 {out}\n\n{out}  {files}, diagnostics.json\n")
    assert run_compare(*directories, [2], None, tmp_path / "elsewhere") == 0
    [found] = json.loads((tmp_path / "elsewhere/comparison.json").read_text())
    assert [test["k"] for test in found["tests"]] == [2]


def a_run(directory: Path, *, unfinished: tuple[int, ...] = ()) -> dict[int, Path]:
    """Evaluations of a run's steps."""
    evaluations = {step: directory / f"evaluations/step_{step:06d}" for step in (0, 9, 10)}
    right = np.random.default_rng(0).random((3, 8)) < 0.5
    for step, path in evaluations.items():
        store(
            path,
            right,
            seed=step,
            model=ModelRecord(path="m", fingerprint="w", step=step, run=str(directory)),
            **({"finished": None} if step in unfinished else {}),
        )
    return evaluations


@pytest.mark.parametrize(("unfinished", "newest"), [((), 10), ((10,), 9)])
def test_of_a_run_the_newest_finished_evaluation_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], unfinished: tuple[int, ...], newest: int
) -> None:
    evaluations = a_run(tmp_path / "run", unfinished=unfinished)
    assert run_compare(evaluations[0], tmp_path / "run", None, None, None, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert f"its newest finished evaluation is {evaluations[newest]}\n" in said
    assert [f"{path} is not finished" in said for path in evaluations.values()] == [
        step in unfinished for step in evaluations
    ]


def test_a_run_without_a_finished_evaluation_is_refused(tmp_path: Path) -> None:
    evaluations = a_run(tmp_path / "run", unfinished=(0, 9, 10))
    with pytest.raises(RapoError, match=rf"none of its evaluations is finished \({evaluations[10]}\)"):
        run_compare(evaluations[0], tmp_path / "run", None, None, None, None)


def test_an_evaluation_by_its_name_may_be_unfinished_which_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluations = a_run(tmp_path / "run", unfinished=(10,))
    assert run_compare(evaluations[0], evaluations[10], None, None, None, None) == 0
    assert f"{evaluations[10]} is not finished; the samples that it has" in capsys.readouterr().out


def test_nothing_is_compared_with_itself(tmp_path: Path) -> None:
    evaluations = a_run(tmp_path / "run")
    again = tmp_path / "again"
    again.symlink_to(tmp_path / "run")
    example = f"such as `megatron-rapo compare {evaluations[0]} {evaluations[10]}`"
    with pytest.raises(RapoError, match=f"would be compared with itself; name two evaluations, {example}"):
        run_compare(tmp_path / "run", tmp_path / "run", None, None, None, None)
    for one, other in ((evaluations[10], again), (evaluations[9], evaluations[9])):
        with pytest.raises(RapoError, match="would be compared with itself; name two evaluations"):
            run_compare(one, other, None, None, None, None)
