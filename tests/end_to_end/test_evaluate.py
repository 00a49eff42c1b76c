"""`megatron-rapo evaluate`: a table from two commands' words, and nothing lost or repeated by a kill."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from megatron_rapo.evaluation.draws import tries
from megatron_rapo.evaluation.store import Evaluation
from tests.end_to_end.command import MODEL, Command, running

Finished = tuple[Path, Command]

OPTIONS = [
    *("--model", str(MODEL), "--max-response-tokens", "32"),
    *("--data", '{source = "countdown", numbers = 3}', "arithmetic"),
    *("--set", "model.dtype=float32", "rollout.max_prompt_tokens=32", "reward.workers=1"),
    *("evaluate.problems=8", "evaluate.batch=64"),
    "evaluate.settings=[{}, {temperature = 0.6, top_p = 0.9}]",
]

ADAPTIVE = [
    *("--model", str(MODEL), "--max-response-tokens", "32", "--data", '{source = "countdown", numbers = 3}'),
    *("--set", "model.dtype=float32", "rollout.max_prompt_tokens=32", "evaluate.problems=8"),
    "evaluate.batch=32",
]


def rows(directory: Path) -> dict[tuple[str, str, str, int], tuple[str, str]]:
    """What each sample says, by data set, setting, problem and number."""
    evaluation = Evaluation.open(directory)
    found = {}
    for data, setting in evaluation:
        for batch in evaluation.samples(data, setting).stream(["problem", "sample", "text", "outcome"]):
            for row in batch.to_pylist():
                key = (data, setting, row["problem"], row["sample"])
                assert key not in found
                found[key] = (row["text"], row["outcome"])
    return found


def evaluate(*arguments: str, status: int = 0) -> tuple[str, str]:
    with running("evaluate", *arguments) as command:
        assert command.wait() == status, command.stderr
        return command.stdout, command.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An evaluation that was not interrupted, and what it printed."""
    directory = tmp_path_factory.mktemp("whole") / "evaluation"
    stdout, _ = evaluate(*OPTIONS, "--samples", "48", "--out", str(directory))
    return directory, stdout


def test_samples_and_numbers_of_all_data_sets_and_settings(whole: tuple[Path, str]) -> None:
    directory, stdout = whole
    evaluation = Evaluation.open(directory)
    assert evaluation.manifest.finished is not None
    assert evaluation.manifest.model.path == str(MODEL)
    stores = [(data, setting) for data in ("countdown", "arithmetic") for setting in ("t1", "t0.6-p0.9")]
    assert list(evaluation) == stores
    assert len(rows(directory)) == 4 * 8 * 48
    read = json.loads((directory / "results.json").read_text())
    results = {(row["data"], row["setting"]): row["statistics"] for row in read}
    with (directory / "results.csv").open() as file:
        written = {(r["data"], r["setting"], r["metric"]): r for r in csv.DictReader(file)}
    for data, setting in stores:
        counts = evaluation.samples(data, setting).counts()
        mean = counts.correct.sum() / (8 * 48)
        assert results[data, setting]["mean"]["mean"] == pytest.approx(mean)
        assert float(written[data, setting, "pass@1"]["value"]) == pytest.approx(mean)
        assert f"{data} {setting} · 8 problems × 48 samples" in stdout
    # The tiny model was made for three-number countdown: some are right, and colder is not the same.
    assert results["countdown", "t1"]["mean"]["mean"] > 0
    found = rows(directory)
    assert [found["countdown", "t1", "0", n] for n in range(48)] != [
        found["countdown", "t0.6-p0.9", "0", n] for n in range(48)
    ]


def test_a_kill_loses_and_repeats_nothing(whole: tuple[Path, str], tmp_path: Path) -> None:
    directory = tmp_path / "evaluation"
    arguments = ["--samples", "48", "--out", str(directory), *OPTIONS]
    with running("evaluate", *arguments) as command:
        command.wait_until(lambda: len(list(directory.rglob("part-*.parquet"))) >= 9)
        command.process.kill()
        command.wait()
    before = rows(directory)
    assert 0 < len(before) < 4 * 8 * 48
    stdout, _ = evaluate(*arguments)
    assert f"has {len(before):,} of 1,536 samples; going on" in stdout
    after = rows(directory)
    assert {key: after[key] for key in before} == before
    assert after == rows(whole[0])


def test_more_samples_are_added_to_those_that_are_there(whole: tuple[Path, str]) -> None:
    directory, _ = whole
    before = rows(directory)
    stdout, _ = evaluate(*OPTIONS, "--samples", "50", "--out", str(directory))
    assert "has 1,536 of 1,600 samples" in stdout
    after = rows(directory)
    assert len(after) == 4 * 8 * 50
    assert {key: after[key] for key in before} == before
    _, stderr = evaluate(*OPTIONS, "run.seed=5", "--samples", "50", "--out", str(directory), status=1)
    assert "holds an evaluation that differs in the seed (1234, now 5)" in stderr


def test_an_adaptive_budget_saves_samples(whole: tuple[Path, str], tmp_path: Path) -> None:
    directory = tmp_path / "adaptive"
    stdout, _ = evaluate("--samples", "48", "--stop-after-correct", "2", "--out", str(directory), *ADAPTIVE)
    evaluation = Evaluation.open(directory)
    samples = evaluation.samples("countdown", "t1")
    drawn = len(samples.present())
    assert drawn < 8 * 48
    assert f"{drawn:,} of 384 samples sufficed" in stdout
    ids = [problem.id for problem in samples.problems]
    table = samples.read(["problem", "sample", "outcome"])
    expected = tries(table, ids, 48, 2).draws().pass_at_k(8).mean()
    [result] = json.loads((directory / "results.json").read_text())
    assert result["statistics"]["pass_at_k"]["8"]["mean"] == pytest.approx(expected)


def test_a_run_is_compared_with_its_base(whole: tuple[Path, str], finished: Finished, tmp_path: Path) -> None:
    """A checkpoint is exported, evaluated, and compared with the model that it was trained from."""
    # Another seed of the samples: the problems, which are generated, are the base's all the same.
    options = ["--model", str(finished[0] / "checkpoints"), *OPTIONS[2:], "run.seed=2"]
    evaluate("--samples", "48", "--out", str(tmp_path / "trained"), *options)
    trained = Evaluation.open(tmp_path / "trained")
    assert (trained.manifest.model.run, trained.manifest.model.step) == (str(finished[0]), 4)
    assert not list((tmp_path / "trained").glob("model*"))  # what was exported is gone
    directories = [str(whole[0]), str(tmp_path / "trained")]
    with running("compare", *directories, "--k", "1", "8", "--diagnose", "4") as command:
        assert command.wait() == 0, command.stderr
    assert "run step 4 against tiny-countdown" in command.stdout
    assert "countdown t1 · 8 problems" in command.stdout
    out = tmp_path / "trained" / "comparison"
    [first, *_] = json.loads((out / "comparison.json").read_text())
    assert [test["k"] for test in first["tests"]] == [1, 8]
    with (out / "ledger.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4 * 8
    found = {(one["data"], one["setting"]): one for one in json.loads((out / "diagnostics.json").read_text())}
    diagnostics = found["countdown", "t1"]["diagnostics"]
    assert diagnostics["responses"] == 4
    # Four steps from the base: near it, and not it.
    assert 0 < sum(diagnostics["forward_kl"]) < 10
