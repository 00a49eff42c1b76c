"""When a checkpoint is due: by steps, by rank 0's clock, and after the last step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.checkpoint import store as module
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config.load import validate


@pytest.mark.parametrize(
    ("options", "minutes", "due"),
    [
        ({}, 29.9, [9]),
        ({}, 30.1, [1, 2, 3, 9]),
        ({"every_minutes": 5.0}, 5.1, [1, 2, 3, 9]),
        ({"every_minutes": 0.0}, 600.0, [9]),
        ({"every": 2}, 1.0, [2, 9]),
    ],
)
def test_a_checkpoint_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], minutes: float, due: list[int]
) -> None:
    config = validate(
        {
            "run": {"directory": str(tmp_path), "steps": 9},
            "model": {"path": "model"},
            "data": {"source": "countdown"},
            "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
            "checkpoint": options,
        },
        "test",
    )
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    store = CheckpointStore(config)
    now += minutes * 60
    assert [step for step in (1, 2, 3, 9) if store.due(step)] == due
