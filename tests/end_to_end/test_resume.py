"""A run that was stopped and resumed is the run that was not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.command import (
    Command,
    checkpoints,
    heartbeats,
    metrics,
    run,
    started,
    without_times,
    write_config,
)
from tests.end_to_end.conftest import EVALUATE, LAYOUT

Finished = tuple[Path, Command]


def stopped_after(step: int, finished: Path, directory: Path) -> None:
    """A copy of the finished run as it stood after `step`, with a later step begun and logged."""
    shutil.copytree(finished, directory)
    shutil.rmtree(directory / "model")
    for later in range(step + 1, 5):
        shutil.rmtree(directory / f"checkpoints/step_{later:06d}")


def test_a_killed_run_goes_on_bit_for_bit(finished: Finished, tmp_path: Path) -> None:
    """Killed in step 3, all at once; its first two steps also show that one seed makes one run."""
    directory = tmp_path / "run"
    config = write_config(tmp_path / "run.toml", directory, parallel=LAYOUT, evaluate=EVALUATE)

    def in_step_3() -> bool:
        beats = heartbeats(directory)
        return bool(beats) and beats[0]["step"] == 3 and beats[0]["phase"] == "update"

    with started(config) as command:
        command.wait_until(in_step_3)
        command.kill()
    assert command.left_processes() == []
    assert checkpoints(directory)[-1] == "step_000002"

    resumed = run(config)
    assert resumed.process.returncode == 0, resumed.stderr
    assert list(map(without_times, metrics(directory))) == list(map(without_times, metrics(finished[0])))
    for written in (finished[0] / "model").iterdir():
        assert (directory / "model" / written.name).read_bytes() == written.read_bytes(), written.name


def test_another_layout_goes_on_with_the_same_losses(finished: Finished, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    stopped_after(2, finished[0], directory)
    config = write_config(
        tmp_path / "run.toml",
        directory,
        run={"steps": 3},
        parallel={"pipeline_parallel": 2, "data_parallel": 2},
        evaluate=EVALUATE,
    )
    resumed = run(config)
    assert resumed.process.returncode == 0, resumed.stderr
    before, after = metrics(finished[0]), metrics(directory)
    assert [line["step"] for line in after] == [0, 1, 2, 3]
    assert after[:3] == before[:3], "what was logged before stays as it is"
    expected, found = before[3], after[3]
    assert found["mismatch/log_prob_mean"] < 1e-5
    for name in ("loss/total", "loss/entropy", "loss/divergence", "optimizer/gradient_norm"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert found["reward/mean"] == expected["reward/mean"]


def test_a_run_that_must_not_go_on_is_refused(finished: Finished, tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.toml", finished[0], checkpoint={"resume": False})
    before = metrics(finished[0])
    command = run(config)
    assert command.process.returncode == 1
    assert "choose another directory, or set checkpoint.resume = true" in command.stderr
    assert metrics(finished[0]) == before
