"""From `init` to the first trained step, with a file of one's own of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rapo.init.project import KINDS
from tests.end_to_end.command import metrics, run, running


def command(*words: str) -> str:
    with running(*words) as started:
        assert started.wait() == 0, started.stdout + started.stderr
        return started.stdout


KINDS_TRAINED = [
    kind if kind == "environment" else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in KINDS
]


# `init` and the project's own test are tests/unit/test_init.py's; `try` is the same for all kinds.
@pytest.mark.parametrize("kind", KINDS_TRAINED)
def test_a_new_project_is_tried_and_trained(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    command("init", str(folder), "--kind", kind)
    shown = command("try", str(folder / "configuration.toml"), "--responses", "2")
    assert "response 2 of 2" in shown
    trained = run(folder / "configuration.toml", "run.steps=1", "evaluate.samples=8", "evaluate.problems=2")
    assert trained.process.returncode == 0, trained.stderr
    line = metrics(folder / "run")[1]
    own = {"reward": "reward/numbers", "method": "loss/overconfident", "environment": "reward/tries"}
    assert line[own[kind]] > 0
    assert list((folder / "run/model").glob("*.safetensors"))
