"""The alarm on the gap between engines and trainer, as rank 0's observer sounds it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.observe.observer import Observer
from tests.unit.test_metrics import configuration


def observe(config: RunConfig, *gaps: float) -> None:
    with Observer(config, rank=0, world_size=1) as observer:
        observer.open_logs(None)
        observer.finish_step({})  # before the first step nothing is sampled
        for step, gap in enumerate(gaps, 1):
            observer.begin_step(step)
            observer.finish_step({"mismatch/log_prob_mean": gap})


def test_each_crossing_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    observe(configuration(tmp_path, mismatch_alarm=0.02), 0.01, 0.03, 0.05, 0.02, 0.04)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in warnings] == ["step 2", "step 5"]
    assert "mismatch/log_prob_mean = 0.03" in warnings[0]
    assert "observe.mismatch_alarm = 0.02" in warnings[0]
    assert f"megatron-rapo doctor --mismatch {tmp_path / 'config.toml'}" in warnings[0]


def test_the_run_ends_where_that_is_asked_for_once_the_step_is_written(tmp_path: Path) -> None:
    with pytest.raises(RapoError, match=r"step 2: mismatch/log_prob_mean = 0\.5"):
        observe(configuration(tmp_path, mismatch_action="stop"), 0.01, 0.5, 0.01)
    assert '"mismatch/log_prob_mean": 0.5' in (tmp_path / "metrics.jsonl").read_text()
