"""The best checkpoint: highest value, remembered over a restart, only as long as it is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rapo.checkpoint.best import BestCheckpoint
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import validate
from megatron_rapo.errors import RapoError


def test_the_highest_value_is_the_best_and_a_tie_the_first(tmp_path: Path) -> None:
    best = BestCheckpoint(tmp_path, "pass@1")
    values = [(1, 0.2), (2, 0.5), (3, 0.5), (4, 0.4)]
    assert [best.take(step, {"evaluate/pass@1": value}) for step, value in values] == [
        True,
        True,
        False,
        False,
    ]
    assert not best.take(5, {"reward/mean": 1.0})
    assert (best.step, best.value) == (2, 0.5)


def test_it_is_remembered_while_its_checkpoint_is_there(tmp_path: Path) -> None:
    best = BestCheckpoint(tmp_path, "pass@1")
    best.take(7, {"evaluate/pass@1": 0.5})
    told = best.told(7)
    assert told is not None and best.told(1) is None
    best.write(told)
    assert BestCheckpoint(tmp_path, "pass@1").step is None  # the checkpoint is not there
    (tmp_path / "step_000007").mkdir()
    again = BestCheckpoint(tmp_path, "pass@1")
    assert not again.take(8, {"evaluate/pass@1": 0.5}) and again.step == 7
    assert BestCheckpoint(tmp_path, "pass@4").value is None  # of another metric
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 7, "metric": "pass@1", "value": 0.5}


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(RapoError, match=r"best.json is damaged .*remove it"):
        BestCheckpoint(tmp_path, "pass@1")


def test_the_best_is_not_pruned(tmp_path: Path) -> None:
    config = validate(
        {
            "run": {"directory": str(tmp_path), "steps": 9},
            "model": {"path": "model"},
            "data": {"source": "countdown"},
            "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
            "checkpoint": {"keep": 2},
            "evaluate": {"best": "pass@1"},
        },
        "test",
    )
    store = CheckpointStore(config)
    for step in range(1, 6):
        (store.directory / f"step_{step:06d}").mkdir(parents=True)
        (store.directory / f"step_{step:06d}" / "run.json").write_text("{}")
    assert store.best is not None and store.best.take(2, {"evaluate/pass@1": 0.5})
    store._prune()
    assert sorted(path.name[-1] for path in store.directory.iterdir()) == ["2", "4", "5"]
