"""A method of the user's own, outside the package, with a state and a term of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.end_to_end.command import metrics, run, without_times, write_config
from tests.own_method import ADDRESS, write_method


def test_a_method_of_ones_own_trains_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_method(tmp_path / "code")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"

    def config(directory: Path) -> Path:
        algorithm = {"method": ADDRESS, "memory": 0.5, "penalty": 0.3}
        return write_config(tmp_path / "code" / "run.toml", directory, run={"steps": 2}, algorithm=algorithm)

    command = run(config(whole))
    assert command.process.returncode == 0, command.stderr
    lines = metrics(whole)
    assert 0.0 < lines[1]["loss/overconfident"] < 1.0

    def saved(step: int) -> dict[str, object]:
        return json.loads((whole / f"checkpoints/step_{step:06d}/run.json").read_text())["state"]

    baseline = 0.0
    for step in (1, 2):
        baseline = 0.5 * baseline + 0.5 * lines[step]["reward/mean"]
        assert saved(step)["method"] == ADDRESS
        assert lines[step]["method/baseline"] == pytest.approx(baseline)
        assert saved(step)["method_state"] == {"baseline": pytest.approx(baseline)}
    assert baseline > 0.0, "no reward was earned, so the state says nothing"

    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    shutil.rmtree(resumed / "checkpoints/step_000002")
    command = run(config(resumed))
    assert command.process.returncode == 0, command.stderr
    assert list(map(without_times, metrics(resumed))) == list(map(without_times, lines))
    for written in (whole / "model").iterdir():
        assert (resumed / "model" / written.name).read_bytes() == written.read_bytes(), written.name
