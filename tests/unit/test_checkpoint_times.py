"""When a checkpoint is due: by steps, by the clock, and after the last step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import validate


def store(tmp_path: Path, **checkpoint: Any) -> CheckpointStore:
    options = {
        "run": {"directory": str(tmp_path), "steps": 9},
        "model": {"path": "model"},
        "data": {"source": "countdown"},
        "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
        "checkpoint": checkpoint,
    }
    return CheckpointStore(validate(options, source="test"))


def test_by_steps_and_after_the_last(tmp_path: Path) -> None:
    assert [step for step in range(1, 10) if store(tmp_path, every=4).due(step)] == [4, 8, 9]
    assert [step for step in range(1, 10) if store(tmp_path).due(step)] == [9]


@pytest.mark.parametrize(
    ("minutes", "after_s", "due"), [(2.0, 119, False), (2.0, 121, True), (0.0, 10**9, False)]
)
def test_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, after_s: float, due: bool
) -> None:
    started = store(tmp_path, every_minutes=minutes)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + after_s)
    assert started.due(1) is due
