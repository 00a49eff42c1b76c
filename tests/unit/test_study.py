"""Studies: plan, runs, what is refused, and the answer; the runs are made up."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rapo.cli import main
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import diagnostics
from megatron_rapo.evaluation.pass_at_k import pass_at_k
from megatron_rapo.evaluation.store import Evaluation
from megatron_rapo.study import command, running
from megatron_rapo.study.analysis import analyse
from megatron_rapo.study.answer import answer
from megatron_rapo.study.attempts import Attempt, add_attempt, read_attempts
from megatron_rapo.study.cost import left
from megatron_rapo.study.diagnosed import mean_by_kind, mean_by_position
from megatron_rapo.study.figures import plots
from megatron_rapo.study.local import run_all
from megatron_rapo.study.making import Stopper
from megatron_rapo.study.opened import Opened
from megatron_rapo.study.plan import PlannedRun
from megatron_rapo.study.results import file_of, read_result
from megatron_rapo.study.schema import Arm, Contrast, Factor, Study, Tuning
from tests.models import make_hf_model
from tests.studies import STUDY, leave_folder, maker, open_study

ROOT = Path(__file__).parents[2]
PROBLEMS = 40
TUNING = {
    "trials": 2,
    "seeds": [11],
    "options": {"run.steps": 2, "evaluate.data": [{"source": "countdown", "numbers": 3, "seed": 7}]},
}


def counts(run: PlannedRun) -> list[int]:
    """Of 8 samples; arm b solves more."""
    generator = np.random.default_rng([run.seed, len(run.arm)])
    chances = np.linspace(0.05, 0.6, PROBLEMS) + (0.25 if run.arm == "b" else 0.0)
    return generator.binomial(8, chances).tolist()


def make_all(opened: Opened, monkeypatch: pytest.MonkeyPatch, correct: Any = counts) -> None:
    monkeypatch.setattr("megatron_rapo.study.local.POLL_S", 0.01)
    make = maker(correct)
    monkeypatch.setattr(running, "run_all", lambda *given: run_all(*given, make=make))
    assert running.run(opened, 2)


# The plan


def test_runs_are_ordinary_commands_seed_by_seed(tmp_path: Path) -> None:
    opened = open_study(tmp_path)
    stages = opened.plan()
    assert [run.name for run in stages.main][:4] == ["a-seed1", "b-seed1", "a-seed2", "b-seed2"]
    [words] = stages.main[1].commands()
    assert words[:3] == ["train", str(tmp_path / "base.toml"), "--set"]
    assert set(words[3:]) == {
        "optimizer.learning_rate=0.002",
        "run.seed=1",
        f'run.directory="{tmp_path / "study/runs/b-seed1"}"',
    }
    assert stages.main[1].config.optimizer.learning_rate == 2e-3


def test_factors_make_a_grid_over_arms(tmp_path: Path) -> None:
    factors = [
        {"option": "algorithm.method", "values": ["rapo", "grpo"]},
        {"option": "run.steps", "values": [3, 6]},
    ]
    contrasts = [{"arm": "a, method=rapo, steps=3", "against": "a, method=grpo, steps=3"}]
    opened = open_study(tmp_path, factors=factors, contrasts=contrasts, arms=[{"name": "a"}])
    runs = opened.plan().main
    assert len(runs) == 4 * 3
    assert {(run.config.run.steps, run.config.algorithm.method) for run in runs} == {
        (steps, method) for steps in (3, 6) for method in ("rapo", "grpo")
    }


def test_a_model_as_it_is_and_an_evaluation_of_its_own(tmp_path: Path) -> None:
    arms = [{"name": "a"}, {"name": "b", "train": False, "seed_offset": 100}]
    opened = open_study(tmp_path, arms=arms, evaluation={"samples": 32})
    trained, base = opened.plan().main[:2]
    train, evaluate = trained.commands()
    assert (train[0], evaluate[0]) == ("train", "evaluate")
    assert "evaluate.samples=32" in evaluate and "evaluate.samples=32" not in train
    assert evaluate[evaluate.index("--model") + 1] == str(trained.directory / "model")
    [alone] = base.commands()
    assert alone[0] == "evaluate" and "--model" not in alone and "run.seed=101" in alone


def test_an_arm_may_have_only_the_first_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = [*STUDY["arms"], {"name": "chooser", "train": False, "seed_offset": 100, "seeds": 1}]
    hard = [{"arm": "b", "against": "a", "hard": "chooser"}]
    opened = open_study(tmp_path, arms=arms, contrasts=hard, evaluation={"samples": 8})
    assert [run.seed for run in opened.plan().main if run.arm == "chooser"] == [1]
    make_all(opened, monkeypatch)
    analysis = analyse(opened.study, opened.plan(), opened.folder)
    assert analysis.primary.chosen_by == 8, "samples of one run"
    [plot] = [plot for plot in plots(analysis) if plot.name == "by_difficulty"]
    runs = {run.name: np.array(counts(run)) for run in opened.plan().main}
    never = runs["chooser-seed1"] == 0
    at_4 = np.mean([pass_at_k(runs[f"b-seed{seed}"], 8, 4)[never].mean() for seed in (1, 2, 3)])
    of_b = next(line for line in plot.lines if line.label == "b")
    assert (of_b.x[0], of_b.y[0]) == (0, pytest.approx(at_4))
    assert {line.label for line in plot.lines} == {"a", "b"}
    arms[2]["seeds"] = 3
    with pytest.raises(RapoError, match=r"chooser has seeds = 3 of 3, which leaves none out"):
        open_study(tmp_path, arms=arms)


def test_a_run_takes_the_cores_of_its_layout(tmp_path: Path) -> None:
    arms = [{"name": "a"}, {"name": "b", "options": {"parallel.tensor_parallel": 2}}]
    opened = open_study(tmp_path, arms=arms)
    assert [run.cores for run in opened.plan().main[:2]] == [1, 2]
    with pytest.raises(RapoError, match=r"b-seed1 keeps 2 cores busy .* --cores is 1; give more"):
        command.show_plan(opened, 1)
    assert [run.cores for run in open_study(tmp_path, arms=arms, cores_per_run=3).plan().main[:2]] == [3, 3]


def test_the_cost_is_that_of_finished_runs_and_else_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_study(tmp_path)
    assert "left: 6 runs of unknown cost" in command.show_plan(opened, 2)
    run = opened.plan().main[0]
    assert maker(counts)(run, opened.folder, Stopper())
    stages = opened.plan()
    cost = left(opened.standings(stages), stages.results)
    assert cost.core_hours == pytest.approx(5 * 36 / 3600)
    assert "of other arms" in cost.source
    assert "spent: 0.01 core-hours" in command.show_status(opened)


def test_the_pace_of_a_run_that_has_begun_is_an_estimate(tmp_path: Path) -> None:
    opened = open_study(tmp_path)
    leave_folder(opened.plan().main[0], [0, 1])  # 3 steps of 1 s
    stages = opened.plan()
    cost = left(opened.standings(stages), stages.results)
    assert cost.core_hours == pytest.approx((5 * 3 + 0) / 3600)
    assert "have begun" in cost.source


def test_the_pages_study_and_the_example_are_studies(tmp_path: Path) -> None:
    """Every key of a study file is explained by the page."""
    page = (ROOT / "docs/studies.md").read_text()
    [block] = re.findall(r"^```toml\n(.*?)^```$", page, re.M | re.S)
    file = tmp_path / "study.toml"
    file.write_text(block)
    shutil.copy(ROOT / "examples/study/base.toml", tmp_path)
    stages = Opened.at(file).plan()
    assert len(stages.tuning) == 2 * 6 and len(stages.main) == 4 * 5
    example = Opened.at(ROOT / "examples/study/study.toml").plan()
    assert len(example.main) == 4 and {run.cores for run in example.main} == {1}
    for model in (Study, Arm, Factor, Contrast, Tuning):
        for key in model.model_fields:
            assert f"`{key}`" in page, key


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*/*.toml")), ids=lambda file: file.stem)
def test_shipped_studies_can_be_planned(file: Path, tmp_path: Path) -> None:
    shutil.copytree(file.parent, tmp_path / "study")
    if file.stem != "base":
        stages = Opened.at(tmp_path / "study" / file.name).plan()
        pilot = file.stem == "premise"
        assert len({run.seed for run in stages.main}) >= (3 if pilot else 5), "a verdict takes five"


@pytest.mark.parametrize(
    "results", sorted((ROOT / "studies").glob("*/*/results")), ids=lambda folder: folder.parent.name
)
def test_the_page_of_a_shipped_study_is_made_again_from_its_results(results: Path, tmp_path: Path) -> None:
    """Within a minute; a study's text has the figures that the page has."""
    shutil.copytree(results.parents[1], tmp_path / "study")
    file = tmp_path / "study" / f"{results.parent.name}.toml"
    began = time.monotonic()
    assert main(["study", str(file), "--report"]) == 0
    assert time.monotonic() - began < 60
    report = tmp_path / "study" / results.parent.name / "report"
    with (report / "numbers/contrasts.csv").open() as opened:
        contrasts = list(csv.DictReader(opened))
    page = (ROOT / "docs" / f"study-{results.parents[1].name.replace('_', '-')}.md").read_text()
    for row in contrasts:
        low, difference, high = (
            f"{float(row[name]):+.3f}".replace("-", "−") for name in ("low", "difference", "high")
        )
        assert f"{difference} [{low}, {high}]" in page, row["contrast"]


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrasts": [{"arm": "c", "against": "a"}]},
         r'contrasts\[0\].arm = "c" is no arm of this study; .*"a", "b"'),
        ({"contrasts": [{"arm": "a", "against": "a"}]}, r"names one arm twice"),
        ({"contrasts": [{"arm": "b", "against": "a", "hard": "a"}]}, r"names one arm twice"),
        ({"factors": [{"option": "algorithm.metod", "values": [1, 2]}],
          "contrasts": [{"arm": "a, metod=1", "against": "a, metod=2"}]},
         r'arm "a, metod=1": .*algorithm.metod = 1 is not an option'),
        ({"outcome": "pass_16"}, r'outcome = "pass_16" is none; write pass@K'),
        ({"seeds": [1, 1]}, r"seeds has 1 2 times"),
        ({"seeds": [1]}, r"seeds = \[1\]: "),
        ({"arms": [{"name": "a", "option": {}}, {"name": "b"}]}, r"arms\[0\].option is nothing that"),
        ({"arms": None, "factors": []}, "arms and factors are both missing"),
        ({"arms": [{"name": "a", "options": {"run.seed": 3}}, {"name": "b"}]}, "sets run.seed"),
        ({"arms": [{"name": "a", "tune": {"run.steps": [1]}}, {"name": "b"}]}, r"without a table \[tuning\]"),
        ({"tuning": TUNING}, "searched over nothing"),
        ({"arms": [{"name": "a", "follows": "c"}, {"name": "b"}]},
         'arm "a" follows "c", which is no trained arm'),
        ({"tuning": {**TUNING, "seeds": [1]}}, "tuning.seeds and seeds both have 1"),
        ({"tuning": {**TUNING, "options": {"run.steps": 2}}}, "names no validation problems"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_is_refused_in_a_message(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RapoError, match=f"(?s){message}"):
        open_study(tmp_path, **changes).plan()


def test_files_that_are_no_study_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(tmp_path / "none.toml")]) == 1
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "half.toml").write_text("seeds = [")
    assert main(["study", str(tmp_path / "half.toml")]) == 1
    assert "is not valid TOML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cores", "0"], "--cores 0 runs nothing"),
        (["--until-interval", "0.1"], "needs a width above 0, and --core-hours"),
        (["--core-hours", "1"], "has no effect without --until-interval"),
        (["--slurm", "--report"], "--slurm submits runs"),
        (["--retry-failed", "--status"], "--retry-failed is for runs that are made here"),
    ],
)
def test_options_without_effect_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "study.toml", *options]) == 1
    assert message in capsys.readouterr().err


def test_a_result_or_folder_of_another_configuration_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_all(open_study(tmp_path), monkeypatch)
    arms = [{"name": "a"}, {"name": "b", "options": {"optimizer.learning_rate": 5e-3}}]
    with pytest.raises(
        RapoError, match=r"a-seed1.json is of another .*learning_rate = 0.001, now 1e-06; restore"
    ):
        open_study(tmp_path, arms=arms).plan()
    opened = open_study(tmp_path, seeds=[1, 4])
    run = opened.plan().main[2]
    leave_folder(run, [0, 1])
    options = {**run.identity(), "run.directory": "elsewhere", "optimizer.learning_rate": 0.5}
    line = {"step": 0, "started": "", "options": options, "code": {}}
    (run.directory / "configurations.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(RapoError, match=r"runs/a-seed4 is of another .*learning_rate = 0.5, now 0.001"):
        opened.standings(opened.plan())


def test_options_that_came_after_a_result_count_as_their_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_study(tmp_path)
    make_all(opened, monkeypatch)
    file = file_of(opened.folder, "b-seed2")
    values = json.loads(file.read_text())
    del values["identity"]["rollout.temperature"]  # at its default
    file.write_text(json.dumps(values))
    assert "b-seed2" in opened.plan().results
    del values["identity"]["optimizer.learning_rate"]  # not at it
    file.write_text(json.dumps(values))
    with pytest.raises(RapoError, match=r"learning_rate = 1e-06, now 0.002"):
        opened.plan()


@pytest.mark.parametrize("damage", ["", '{"format": 1', '{"format": 2}', "[]"])
def test_a_half_written_result_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    opened = open_study(tmp_path)
    make_all(opened, monkeypatch)
    file_of(opened.folder, "b-seed2").write_text(damage)
    with pytest.raises(
        RapoError, match=r"b-seed2.json is no whole result .*remove it: the study makes it anew"
    ):
        command.report(opened)


def test_columns_that_differ_in_length_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_study(tmp_path)
    make_all(opened, monkeypatch)
    file = file_of(opened.folder, "b-seed2")
    values = json.loads(file.read_text())
    del values["judged"]["countdown/t1.0"]["correct"][0]
    file.write_text(json.dumps(values))
    with pytest.raises(RapoError, match="its columns differ in length"):
        read_result(file)


def test_runs_of_different_problems_are_not_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_study(tmp_path)
    make_all(opened, monkeypatch)
    run = next(run for run in opened.plan().main if run.name == "b-seed3")
    file_of(opened.folder, run.name).unlink()
    leave_folder(run, counts(run), question="another {place}")
    monkeypatch.setattr("tests.studies.leave_folder", lambda *_: None)
    assert maker(counts)(run, opened.folder, Stopper())
    with pytest.raises(RapoError, match="b-seed3 and a-seed1 were judged on different problems"):
        command.report(opened)


# Running


def test_what_is_there_stays_and_the_grid_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noting(run: PlannedRun) -> list[int]:
        made.append(run.name)
        return counts(run)

    make_all(open_study(tmp_path, seeds=[1, 2]), monkeypatch, noting)
    assert sorted(made) == ["a-seed1", "a-seed2", "b-seed1", "b-seed2"]
    made.clear()
    grown = open_study(tmp_path, seeds=[2, 3], arms=[*STUDY["arms"], {"name": "c"}])
    make_all(grown, monkeypatch, noting)
    assert sorted(made) == ["a-seed3", "b-seed3", "c-seed2", "c-seed3"]
    assert grown.plan().strangers == ["a-seed1", "b-seed1"]
    assert "a-seed1: a result of no run of this study, left out" in command.show_plan(grown, 2)
    assert analyse(grown.study, grown.plan(), grown.folder).primary.seeds == [2, 3]


def test_no_more_cores_are_busy_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_rapo.study.local.POLL_S", 0.01)
    arms = [{"name": "a"}, {"name": "b", "options": {"parallel.tensor_parallel": 2}}]
    opened = open_study(tmp_path, arms=arms)
    busy: list[int] = []
    most: list[int] = []

    def make(run: PlannedRun, _: Path, __: Stopper) -> bool:
        busy.append(run.cores)
        most.append(sum(busy))
        time.sleep(0.03)
        busy.remove(run.cores)
        return True

    assert run_all(opened.plan().main, tmp_path, 3, 0, lambda: None, make=make)
    assert len(most) == 6 and max(most) == 3


FAKE = """
import json, signal, sys, time
from pathlib import Path
settings = dict(word.split("=", 1) for word in sys.argv[sys.argv.index("--set") + 1:])
directory = Path(json.loads(settings["run.directory"]))
directory.mkdir(parents=True, exist_ok=True)
(directory / "starts").open("a").write("x")
name = directory.name
if name.startswith("b"):
    print("error: out of luck")
    sys.exit(3)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(directory / "up").touch()
time.sleep(20 if name == "a-seed2" else 0)
sys.exit(4)
"""


def test_a_run_that_fails_for_good_is_told_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands are processes here: what they say and how they end stands in attempts and logs."""
    monkeypatch.setattr("megatron_rapo.study.making._program", lambda: ["python3", "-c", FAKE])
    monkeypatch.setattr("megatron_rapo.study.local.POLL_S", 0.01)
    opened = open_study(tmp_path, seeds=[1, 3], retries=1)
    assert running.run(opened, 2)
    [first, second] = read_attempts(opened.folder, "b-seed1")
    assert (first.status, first.failed, second.failed) == (3, True, True)
    assert "error: out of luck" in first.told and "$ megatron-rapo train" in first.told
    assert (opened.folder / "runs/b-seed1/starts").read_text() == "xx", (
        "it was started once more, and then left"
    )
    assert running.run(opened, 2), "and is not started again"
    assert (opened.folder / "runs/b-seed1/starts").read_text() == "xx"
    assert running.run(opened, 2, retry_failed=True)
    assert (opened.folder / "runs/b-seed1/starts").read_text() == "xxxx"
    status = command.show_status(opened)
    assert re.search(r"b-seed1 +failed", status) and "out of luck" in status
    told = command.report(opened)
    assert "no answer, since both arms have 0 finished seeds in common" in told
    page = (opened.folder / "report/report.html").read_text()
    assert "4 runs have no result and are left out by rule" in page and "failed 2 times" in page


def test_a_study_that_is_stopped_stops_its_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rapo.study.making._program", lambda: ["python3", "-c", FAKE])
    monkeypatch.setattr("megatron_rapo.study.local.POLL_S", 0.01)
    opened = open_study(tmp_path, seeds=[2, 3])
    run = opened.plan().main[0]
    stoppers: list[Stopper] = []

    def asks() -> None:
        if (run.directory / "up").exists():
            stoppers[0].ask()

    def make(run: PlannedRun, folder: Path, stopper: Stopper) -> bool:
        from megatron_rapo.study.making import make

        stoppers.append(stopper)
        return make(run, folder, stopper)

    began = time.monotonic()
    assert not run_all([run], opened.folder, 1, 1, asks, make=make)
    assert time.monotonic() - began < 15
    [attempt] = read_attempts(opened.folder, run.name)
    assert attempt.stopped and not attempt.failed, "it counts as no failure"
    assert opened.todo(opened.plan())[0].name == run.name


def test_a_command_ends_with_a_study_that_is_killed(tmp_path: Path) -> None:
    """So that the run's folder is free when the study goes on."""
    file, mark = open_study(tmp_path).file, tmp_path / "asked to end"
    child = (
        "import signal, sys, time; from pathlib import Path\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (Path({str(mark)!r}).touch(), sys.exit(0)))\n"
        f"Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"
    )
    code = (
        "from megatron_rapo.cli import main; from megatron_rapo.study import making\n"
        f"making._program = lambda: [{sys.executable!r}, '-c', {child!r}]\n"
        f"main(['study', {str(file)!r}, '--only', 'a-seed1'])"
    )
    study = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        wait_for(tmp_path / "up")
    finally:
        study.kill()
        study.wait(10)
    wait_for(mark)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 40
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.05)


def test_seeds_that_one_arm_lacks_are_left_out_of_the_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_study(tmp_path)
    make_all(opened, monkeypatch)
    file_of(opened.folder, "b-seed2").unlink()
    add_attempt(opened.folder, "b-seed2", Attempt("", 1.0, 9, False, "status 9\nkilled"))
    add_attempt(opened.folder, "b-seed2", Attempt("", 1.0, 9, False, "status 9\nkilled"))
    analysis = analyse(opened.study, opened.plan(), opened.folder)
    assert (analysis.primary.seeds, analysis.primary.left_out) == ([1, 3], [2])
    assert [(one.run, one.why) for one in analysis.excluded] == [("b-seed2", "failed 2 times: killed")]


# The answer


def test_the_answer_is_the_paired_difference_and_the_page_has_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_study(tmp_path, seeds=[1, 2, 3, 4, 5])
    make_all(opened, monkeypatch)
    shutil.rmtree(opened.folder / "runs")  # the small tables are all that it is made of
    told = command.report(opened)
    runs = {run.name: np.array(counts(run)) for run in opened.plan().main}
    at_4 = {name: pass_at_k(correct, 8, 4) for name, correct in runs.items()}
    by_seed = [at_4[f"b-seed{seed}"] - at_4[f"a-seed{seed}"] for seed in range(1, 6)]
    with (opened.folder / "report/numbers/contrasts.csv").open() as file:
        [row] = csv.DictReader(file)
    assert float(row["difference"]) == pytest.approx(np.mean(by_seed))
    assert float(row["low"]) < float(row["difference"]) < float(row["high"])
    assert (row["seeds"], row["problems"], row["verdict"]) == ("5", str(PROBLEMS), "higher")
    assert "b − a in pass@4: +" in told and "b is higher" in told
    page = (opened.folder / "report/report.html").read_text()
    for text in (
        "Is b above a?",
        "b is higher",
        "megatron-rapo train",
        "abc",
        "../runs/b-seed3",
        "0.10 core-hours",
    ):
        assert text in page
    assert {file.stem for file in (opened.folder / "report/figures").iterdir()} == {
        *("pass_at_k", "reward_mean", "loss_entropy", "loss_divergence", "outcome_by_tflop")
    }


def test_responses_are_laid_beside_the_model_that_a_run_began_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the diagnostics of a stored evaluation; of several runs, as if their responses were one's."""
    base = make_hf_model(tmp_path / "base", seed=0)
    opened = open_study(tmp_path, evaluation={"samples": 8}, options={"model.path": str(base)}, diagnose=5)
    run = opened.plan().main[0]
    assert run.judged is not None
    model = make_hf_model(run.directory / "model", seed=1)
    assert maker(lambda _: [8, 3])(run, opened.folder, Stopper())
    evaluation = Evaluation.open(run.judged)
    [(data, setting)] = list(evaluation)
    store = evaluation.samples(data, setting)
    expected = diagnostics.diagnose(
        store, evaluation.manifest.settings[0], diagnostics.Pair(base, model), limit=5
    )
    assert expected is not None
    found = read_result(file_of(opened.folder, run.name)).diagnosed[f"{data}/{setting}"]
    assert found.responses == 5
    assert found.entropy == pytest.approx(expected.model_entropy, abs=1e-5)
    assert found.base_entropy == pytest.approx(expected.base_entropy, abs=1e-5)
    assert found.reverse_kl == pytest.approx(expected.reverse_kl, abs=1e-5)
    short = replace(found, reverse_kl=[9.0], reaching=[15])
    both = mean_by_position([found, short], "reverse_kl", 5)
    assert both[0] == pytest.approx((found.reverse_kl[0] * 5 + 9.0 * 15) / 20)
    assert len(mean_by_position([found, short], "reverse_kl", 6)) == 1
    kind = next(iter(found.kinds))
    other = replace(found, kinds={kind: {**found.kinds[kind], "tokens": 1, "reverse_kl": 9.0}})
    tokens, own = found.kinds[kind]["tokens"], found.kinds[kind]["reverse_kl"]
    assert own == pytest.approx(expected.kinds[kind].reverse_kl, abs=1e-5)
    together = mean_by_kind([found, other])[kind]
    assert together["tokens"] == tokens + 1
    assert together["reverse_kl"] == pytest.approx((own * tokens + 9.0) / (tokens + 1))
    leave_folder(opened.plan().main[2], [8, 3])
    make_hf_model(opened.plan().main[2].directory / "model", seed=2)
    assert maker(lambda _: [8, 3])(opened.plan().main[2], opened.folder, Stopper())
    command.report(opened)
    page = (opened.folder / "report/report.html").read_text()
    assert "Correct responses beside the base" in page and kind in page
    figures = {file.stem for file in (opened.folder / "report/figures").iterdir()}
    assert {"entropy_by_position", "reverse_kl_by_position"} <= figures


def test_hard_problems_are_chosen_by_samples_that_do_not_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By regression to the mean the base solves some of what its other sample never solved."""
    arms = [
        {"name": "b"},
        {"name": "base", "train": False},
        {"name": "chooser", "train": False, "seed_offset": 50},
    ]
    contrasts = [{"arm": "b", "against": "base", "hard": "chooser"}]

    def correct(run: PlannedRun) -> list[int]:
        generator = np.random.default_rng([run.config.run.seed, len(run.arm)])
        chances = np.where(np.arange(PROBLEMS) < 20, 0.02, 0.7)
        return generator.binomial(8, chances + (0.2 if run.arm == "b" else 0.0)).tolist()

    opened = open_study(tmp_path, arms=arms, contrasts=contrasts)
    make_all(opened, monkeypatch, correct)
    told = analyse(opened.study, opened.plan(), opened.folder).primary
    choosing = [run for run in opened.plan().main if run.arm == "chooser"]
    never = np.sum([correct(run) for run in choosing], axis=0) == 0
    assert told.difference is not None
    assert (told.difference.problems, told.chosen_by) == (never.sum(), 24)


def test_with_few_seeds_there_is_a_difference_but_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal arms would be told apart too often (tools/bench_studies.py)."""
    opened = open_study(tmp_path, seeds=[1, 2, 3, 4])
    make_all(opened, monkeypatch)
    analysis = analyse(opened.study, opened.plan(), opened.folder)
    assert analysis.primary.holm < 0.05
    assert analysis.primary.verdict == "too few seeds"
    assert "no verdict, since that takes 5 seeds" in answer(analysis)


def test_two_equal_arms_are_not_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(run: PlannedRun) -> list[int]:
        return np.random.default_rng([run.seed, ord(run.arm)]).binomial(8, 0.4, PROBLEMS).tolist()

    opened = open_study(tmp_path, seeds=[1, 2, 3, 4, 5])
    make_all(opened, monkeypatch, alike)
    assert "no difference is found" in answer(analyse(opened.study, opened.plan(), opened.folder))


# The search


def tuned(tmp_path: Path, **changes: Any) -> Opened:
    arms = [
        {"name": "a", "tune": {"optimizer.learning_rate": [1e-4, 2e-4, 3e-4]}},
        {"name": "b", "tune": {"optimizer.learning_rate": [1e-4, 2e-4], "run.steps": [1, 2]}},
    ]
    return open_study(tmp_path, arms=arms, **{"tuning": TUNING, **changes})


def test_each_arm_tries_the_same_number_of_settings_and_takes_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = tuned(tmp_path)
    stages = opened.plan()
    assert [run.name for run in stages.tuning] == [
        *("tuning-a-00-seed11", "tuning-a-01-seed11", "tuning-b-00-seed11", "tuning-b-01-seed11")
    ]
    assert not stages.searched
    with pytest.raises(RapoError, match="--only a-seed1 is no run that can be made now"):
        command.make_one(opened, "a-seed1")
    assert "until it is through" in command.show_plan(opened, 2)

    def by_rate(run: PlannedRun) -> list[int]:
        return [round(run.config.optimizer.learning_rate * 1e4)] * PROBLEMS

    def make(run: PlannedRun, folder: Path, stopper: Stopper) -> bool:
        question = "seen {place}" if run.stage == "tuning" else "held out {place}"
        monkeypatch.setattr(
            "tests.studies.leave_folder", lambda run, c: leave_folder(run, c, question=question)
        )
        return maker(by_rate)(run, folder, stopper)

    monkeypatch.setattr("megatron_rapo.study.local.POLL_S", 0.01)
    monkeypatch.setattr(running, "run_all", lambda *given: run_all(*given, make=make))
    assert running.run(opened, 1)
    stages = opened.plan()
    for arm, search in stages.searches.items():
        rates = [trial.options["optimizer.learning_rate"] for trial in search.tried]
        assert search.chosen is not None
        assert search.chosen.options["optimizer.learning_rate"] == max(rates)
        mine = [run for run in stages.main if run.arm == arm]
        assert {run.config.optimizer.learning_rate for run in mine} == {max(rates)}
    assert "held-out" not in command.report(opened)
    page = (opened.folder / "report/report.html").read_text()
    assert "Search of b" in page and "sensitivity to optimizer.learning_rate" in page


def test_a_smaller_search_of_one_arm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RapoError, match=r'arm "a" has 3 settings to try, and tuning.trials = 4'):
        tuned(tmp_path, tuning={**TUNING, "trials": 4}).plan()


def test_a_search_that_saw_held_out_problems_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = tuned(tmp_path)
    make_all(opened, monkeypatch)
    with pytest.raises(
        RapoError, match=r"40 of the 40 problems that the study is judged on were seen by its search"
    ):
        command.report(opened)


def test_a_few_problems_that_the_search_saw_are_left_out_of_all_arms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = tuned(tmp_path)
    make_all(opened, monkeypatch)
    for file in sorted((opened.folder / "results").glob("tuning-*.json")):
        result = json.loads(file.read_text())
        [judged] = result["judged"].values()
        judged["problems"][3:] = [f"another {place}" for place in range(3, PROBLEMS)]
        file.write_text(json.dumps(result))
    told = command.report(opened)
    page = (opened.folder / "report/report.html").read_text()
    assert "3 of the problems that were judged are left out by rule, of all arms, as the search saw" in page
    runs = opened.plan().main
    for first, stated in ((3, True), (0, False)):
        found = [
            (run.arm, pass_at_k(np.array(counts(run)), np.full(PROBLEMS, 8), 4)[first:].mean())
            for run in runs
        ]
        means = [np.mean([mean for mine, mean in found if mine == arm]) for arm in "ab"]
        assert (f"{means[1] - means[0]:+.3f}" in told) == stated


def test_an_arm_follows_another_with_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"optimizer.learning_rate": [1e-4, 2e-4]}
    control = {"algorithm.method": "matched_entropy", "algorithm.entropy_of": "@run"}
    arms = [
        {"name": "control", "follows": "b", "options": control},
        {"name": "a", "tune": rates},
        {"name": "b", "tune": rates},
    ]
    opened = open_study(tmp_path, arms=arms, tuning=TUNING, seeds=[1, 2])
    made: list[PlannedRun] = []

    def noting(run: PlannedRun) -> list[int]:
        made.append(run)
        return [round(run.config.optimizer.learning_rate * 1e4)] * PROBLEMS

    make_all(opened, monkeypatch, noting)
    assert [run.arm for run in made[-2:]] == ["control", "control"], "it comes after all that it follows"
    for run in made[-2:]:
        assert run.config.algorithm.entropy_of == opened.folder / f"followed/b-seed{run.seed}"  # type: ignore[attr-defined]
        assert run.config.optimizer.learning_rate == 2e-4
    assert not any(run.arm == "control" for run in made if run.stage == "tuning")
    moved = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "study/results", moved / "study/results")
    for file in tmp_path.glob("*.toml"):
        shutil.copy(file, moved)
    assert {"control-seed1", "control-seed2"} <= set(Opened.at(moved / "study.toml").plan().results)


# Further seeds


def test_seeds_are_added_until_the_interval_is_narrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_rapo.study.local.POLL_S", 0.01)
    monkeypatch.setattr(running, "run_all", lambda *given: run_all(*given, make=maker(counts)))
    opened = open_study(tmp_path, seeds=[1, 2, 3])
    assert running.run_until_narrow(opened, 2, target=0.3, core_hours=10)
    looks = json.loads((opened.folder / "looks.json").read_text())
    assert [look["seeds"] for look in looks] == [3, 4, 5, 6], (
        "no look counts before five, and one more is run"
    )
    assert [look["added"] for look in looks] == [[4], [5], [6], []]
    assert looks[-1]["decision"] == "narrow enough"
    assert opened.plan().main[-1].name == "b-seed6", "what was added belongs to the study from now on"
    assert (
        "Looks at the primary"
        in (command.report(opened), (opened.folder / "report/report.html").read_text())[1]
    )


def test_the_budget_and_the_problems_end_the_adding_of_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_rapo.study.local.POLL_S", 0.01)
    monkeypatch.setattr(running, "run_all", lambda *given: run_all(*given, make=maker(counts)))
    opened = open_study(tmp_path, seeds=[1, 2, 3])
    assert running.run_until_narrow(opened, 2, target=0.001, core_hours=0.075)
    looks = json.loads((opened.folder / "looks.json").read_text())
    assert "of 0.075 core-hours 0.06 are spent" in looks[-1]["decision"]
    assert running.run_until_narrow(opened, 2, target=0.001, core_hours=10)
    looks = json.loads((opened.folder / "looks.json").read_text())
    assert looks[-1]["decision"].startswith("stopped: problems alone keep it wider")
    assert looks[-1]["seeds"] == 5


# SLURM


def test_runs_become_tasks_of_an_array(tmp_path: Path) -> None:
    arms = [{"name": "a"}, {"name": "b", "options": {"parallel.tensor_parallel": 2}}]
    opened = open_study(tmp_path, arms=arms, sbatch=["--time=1:00:00"])
    one, two = running.submit(opened, 3, dry_run=True)
    text = one.read_text()
    assert "#SBATCH --array=0-2%3" in text and "#SBATCH --time=1:00:00" in text
    assert "RUNS=(a-seed1 a-seed2 a-seed3)" in text
    assert "#SBATCH --array=0-2%1" in two.read_text() and "#SBATCH --cpus-per-task=2" in two.read_text()


def test_a_task_of_the_array_is_the_run_of_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_study(tmp_path)
    [script] = running.submit(opened, 2, dry_run=True)
    make_all(opened, monkeypatch)
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "a-seed2 is done\n")


def test_a_task_makes_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "make", maker(counts))
    opened = open_study(tmp_path)
    assert main(["study", str(opened.file), "--only", "b-seed2"]) == 0
    assert [file.stem for file in (opened.folder / "results").iterdir()] == ["b-seed2"]
    assert main(["study", str(opened.file), "--only", "nobody"]) == 1
