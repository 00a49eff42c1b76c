"""Metrics: every step stands once, in every log, and nothing that is not finite goes unseen."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rapo.config import RunConfig, validate
from megatron_rapo.errors import RapoError
from megatron_rapo.observe.metrics import MetricsLog


def configuration(directory: Path, **observe: Any) -> RunConfig:
    values = {
        "run": {"directory": str(directory), "steps": 10},
        "model": {"path": "models/tiny"},
        "data": {"source": "countdown"},
        "rollout": {"prompts_per_step": 8, "max_response_tokens": 64},
        "observe": observe,
    }
    return validate(values, source="test")


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


# The file


def test_a_step_is_one_line_with_step_time_and_values(tmp_path: Path) -> None:
    with MetricsLog(configuration(tmp_path / "new" / "run")) as log:
        log.write(0, {"evaluate/pass@16": 0.25, "batch/tokens": 7})
        log.write(3, {"reward/mean": np.float32(0.5)})
    first, second = lines(tmp_path / "new" / "run")
    assert first.pop("time_s") <= second.pop("time_s") < 60
    assert first == {"step": 0, "evaluate/pass@16": 0.25, "batch/tokens": 7, "log/non_finite": 0}
    assert second == {"step": 3, "reward/mean": 0.5, "log/non_finite": 0}


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(configuration(tmp_path)) as log:
        log.write(1, {"reward/mean": 0.5})
        assert lines(tmp_path)[0]["reward/mean"] == 0.5
        assert scalars(tmp_path, "reward/mean") == [(1, 0.5)]


def test_values_that_are_not_finite_are_null_and_counted(tmp_path: Path) -> None:
    with MetricsLog(configuration(tmp_path)) as log:
        log.write(1, {"loss/total": float("nan"), "loss/ratio": float("-inf"), "loss/kl": 0.5})
    (line,) = lines(tmp_path)
    assert (line["loss/total"], line["loss/ratio"], line["loss/kl"]) == (None, None, 0.5)
    assert line["log/non_finite"] == 2
    assert scalars(tmp_path, "log/non_finite") == [(1, 2.0)]
    with pytest.raises(KeyError):
        scalars(tmp_path, "loss/total")


@pytest.mark.parametrize("step", [1, 0])
def test_a_step_is_not_logged_twice(tmp_path: Path, step: int) -> None:
    with MetricsLog(configuration(tmp_path)) as log:
        log.write(1, {})
        with pytest.raises(ValueError, match=rf"step {step} was logged before \(last: 1\)"):
            log.write(step, {})


@pytest.mark.parametrize("name", ["reward", "Reward/mean", "reward/", "/mean", "a b/c", "log/non_finite"])
def test_a_name_outside_the_namespaces_is_refused(tmp_path: Path, name: str) -> None:
    with (
        MetricsLog(configuration(tmp_path)) as log,
        pytest.raises(ValueError, match="is not like reward"),
    ):
        log.write(1, {name: 1.0})


@pytest.mark.parametrize(
    "name", ["reward/Exact-Match", "evaluate/MATH-500/t0.6-p0.95/pass@1_low", "evaluate/my set/t1/unknown"]
)
def test_names_of_the_users_own_are_logged_as_they_are(tmp_path: Path, name: str) -> None:
    """Of a fact, of a data set's file, and of a sampling setting."""
    with MetricsLog(configuration(tmp_path)) as log:
        log.write(1, {name: 0.5})
    assert lines(tmp_path)[0][name] == 0.5


@pytest.mark.parametrize("value", ["0.5", None, torch.tensor(0.5), 1j])
def test_a_value_that_is_no_number_is_refused(tmp_path: Path, value: Any) -> None:
    with MetricsLog(configuration(tmp_path)) as log, pytest.raises(TypeError, match="reward/mean is a "):
        log.write(1, {"reward/mean": value})


# Resuming


def test_after_a_resume_each_step_stands_once(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    with MetricsLog(config) as log:
        for step in range(6):
            log.write(step, {"reward/mean": float(step)})
    with MetricsLog(config, resume_step=3) as log:
        assert [line["step"] for line in log.history] == [0, 1, 2, 3]
        log.write(4, {"reward/mean": 40.0})
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [(line["step"], line["reward/mean"]) for line in lines(tmp_path)] == expected
    assert scalars(tmp_path, "reward/mean") == expected


def test_time_goes_on_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 1000.0}\n')
    with MetricsLog(configuration(tmp_path), resume_step=1) as log:
        log.write(2, {})
    assert 1000.0 <= lines(tmp_path)[1]["time_s"] < 1060.0


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with MetricsLog(configuration(tmp_path)) as log:
            assert log.history == []
            log.write(1, {"reward/mean": value})
    assert [line["reward/mean"] for line in lines(tmp_path)] == [2.0]
    assert scalars(tmp_path, "reward/mean") == [(1, 2.0)]


def test_a_line_that_was_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 1.0}\n{"step": 2, "time_s": 2.0}\n{"ste')
    with MetricsLog(configuration(tmp_path), resume_step=5) as log:
        log.write(6, {})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 6]


@pytest.mark.parametrize("damage", ["{", "3", '{"time_s": 1.0}', '{"step": "x"}'])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "time_s": 1.0}}\n{damage}\n')
    with pytest.raises(RapoError, match=r"metrics\.jsonl line 2 is no step of a run .*; mend or remove"):
        MetricsLog(configuration(tmp_path), resume_step=1)


# Weights & Biases


class FakeWandb(types.ModuleType):
    """Records what the real one would send."""

    class errors:
        class Error(Exception):
            pass

    def __init__(self, refuses: str | None = None) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.ended: list[int] = []
        self._refuses = refuses

    def init(self, **options: Any) -> FakeWandb:
        if self._refuses:
            raise self.errors.Error(self._refuses)
        self.started.append(options)
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


def test_wandb_is_not_imported_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # Importing it would fail.
    with MetricsLog(configuration(tmp_path)) as log:
        log.write(1, {"reward/mean": 0.5})


def test_a_missing_wandb_is_told_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(tmp_path, wandb="offline", wandb_project="p")
    monkeypatch.setattr(sys, "meta_path", [HideWandb(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(RapoError, match=r'observe\.wandb = "offline" needs wandb: pip install wandb'):
        MetricsLog(config)
    # A folder of wandb's logs in the working directory imports as a package without anything in it.
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    with pytest.raises(RapoError, match="pip install"):
        MetricsLog(config)


class HideWandb:
    """Makes wandb look as if it were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = configuration(tmp_path, wandb="online", wandb_project="p")
    for resume_step in (None, 1, None):
        with MetricsLog(config, resume_step) as log:
            log.write(2, {"reward/mean": 0.5, "loss/total": float("nan")})
    first, resumed, anew = (options["id"] for options in wandb.started)
    assert first == resumed != anew
    assert wandb.started[0]["project"] == "p" and wandb.started[0]["mode"] == "online"
    assert wandb.logged[0] == {"step": 2, "reward/mean": 0.5, "log/non_finite": 1}
    assert wandb.ended == [0, 0, 0]


def test_wandb_learns_that_a_run_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = configuration(tmp_path, wandb="offline", wandb_project="p")
    with pytest.raises(KeyError), MetricsLog(config):
        raise KeyError
    assert wandb.ended == [1]


def test_a_wandb_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuses="no API key"))
    config = configuration(tmp_path, wandb="online", wandb_project="p")
    with pytest.raises(RapoError, match=r'"online" did not start: no API key; run `wandb login`'):
        MetricsLog(config)


def test_the_real_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb.sdk", reason="wandb is not installed")
    config = configuration(tmp_path, wandb="offline", wandb_project="p")
    for resume_step, step in ((None, 1), (1, 2)):
        with MetricsLog(config, resume_step) as log:
            log.write(step, {"reward/mean": 0.5})
    run_id = (tmp_path / "wandb_run_id").read_text()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))) == 2
