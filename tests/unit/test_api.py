"""`megatron_rapo.train` and `evaluate` do what the commands do; and the import costs nothing."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import megatron_rapo
from megatron_rapo import api
from megatron_rapo.cli import main
from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import command
from megatron_rapo.evaluation.command import Request
from megatron_rapo.evaluation.results import Result, compute, write
from tests.stored_evaluations import store_evaluation

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples/configs/demo.toml"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The runs that were asked for; nothing is trained."""
    asked: list[RunConfig] = []
    monkeypatch.setattr(api, "run", asked.append)
    return asked


def test_train_runs_what_the_command_runs(ran: list[RunConfig], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 1}\n'
    )
    trained = megatron_rapo.train(str(DEMO), {"run.directory": tmp_path}, {"run": {"steps": 2}})
    assert trained == api.Trained(tmp_path, {"step": 2, "reward/mean": 1})
    assert main(["train", str(DEMO), "--set", f"run.directory={tmp_path}", "run.steps=2"]) == 0
    assert ran == [load_config([DEMO], [f"run.directory={tmp_path}", "run.steps=2"])] * 2


def test_what_train_refuses_is_told_as_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"run.directory": str(tmp_path / "run"), "model.path": str(tmp_path / "none")}
    with pytest.raises(megatron_rapo.RapoError) as refused:
        megatron_rapo.train(DEMO, settings)
    assert main(["train", str(DEMO), "--set", *(f"{key}={value}" for key, value in settings.items())]) == 1
    assert capsys.readouterr().err == f"error: {refused.value}\n"


def test_evaluate_asks_for_what_the_command_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = compute(store_evaluation(tmp_path / "stored", [0, 3, 8]), [1, 8])
    write(results, tmp_path)
    asked: list[Request] = []

    def run(request: Request) -> tuple[Path, list[Result]]:
        asked.append(request)
        return tmp_path, results

    monkeypatch.setattr(command, "run", run)
    table = {"source": "countdown", "numbers": 3}
    evaluated = megatron_rapo.evaluate(
        DEMO,
        model="m",
        data=[Path("a.jsonl"), "arithmetic", table],
        template="plain",
        samples=8,
        k=[1, 8],
        max_response_tokens=9,
        stop_after_correct=3,
        out="here",
    )
    words = ["--model", "m", "--template", "plain", "--samples", "8", "--k", "1", "8"]
    words += ["--max-response-tokens", "9", "--stop-after-correct", "3", "--out", "here"]
    data = ["a.jsonl", "arithmetic", '{ source = "countdown", numbers = 3 }']
    assert main(["evaluate", str(DEMO), *words, "--data", *data]) == 0
    assert asked[0] == replace(asked[1], settings=())

    assert evaluated.directory == tmp_path
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    ends = {"": "value", "_low": "low", "_high": "high"}
    expected = {
        f"toy/t1.0/{row['metric']}{end}": float(row[column])
        for row in rows
        for end, column in ends.items()
        if row[column]
    }
    assert evaluated.metrics == expected and "toy/t1.0/pass@8_low" in expected


def test_what_evaluate_refuses_is_told_as_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    said: dict[str, Any] = {"model": "m", "data": ["countdown"], "samples": 4, "stop_after_correct": 5}
    with pytest.raises(RapoError) as refused:
        megatron_rapo.evaluate(**said)
    words = ["--model", "m", "--data", "countdown", "--samples", "4", "--stop-after-correct", "5"]
    assert main(["evaluate", *words]) == 1
    assert capsys.readouterr().err == f"error: {refused.value}\n"


IMPORTS = """
import json, sys
import megatron_rapo
found = [[name for name in json.loads(sys.argv[1]) if name in sys.modules]]
from megatron_rapo import *
found.append([name for name in json.loads(sys.argv[1]) if name in sys.modules])
from megatron_rapo.testing import a_problem, run_environment
found.append([name for name in json.loads(sys.argv[1]) if name in sys.modules])
print(json.dumps(found))
"""


def test_the_import_is_light() -> None:
    """All of the names cost no torch, and the package alone costs no library at all."""
    heavy = ["torch", "transformers", "megatron.core", "scipy", "pyarrow", "pydantic", "numpy"]
    found = subprocess.run(
        [sys.executable, "-c", IMPORTS, json.dumps(heavy)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    alone, names, testing = json.loads(found.stdout)
    assert alone == []
    assert {*names, *testing} <= {"pydantic", "numpy"}


def test_every_name_is_listed_and_there() -> None:
    assert {*megatron_rapo.__all__} == {*megatron_rapo._PUBLIC, "__version__"}
    assert {*megatron_rapo.__all__} <= {*dir(megatron_rapo)}
