"""From `init` to the first trained step, with a file of one's own of each kind, and from Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rapo.init.project import KINDS
from tests.end_to_end.command import TIMEOUT_S, metrics, running


def command(*words: str) -> str:
    with running(*words) as started:
        assert started.wait() == 0, started.stdout + started.stderr
        return started.stdout


KINDS_TRAINED = [
    kind if kind == "environment" else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in KINDS
]


def from_python(folder: Path) -> str:
    """Runs the example of docs/python.md, a plain script, beside the project."""
    page = (Path(__file__).parents[2] / "docs/python.md").read_text(encoding="utf-8")
    script = folder.parent / "script.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    command = [sys.executable, str(script)]
    return subprocess.run(
        command, cwd=folder.parent, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True
    ).stdout


# `init` and the project's own test are tests/unit/test_init.py's; `try` is the same for all kinds.
@pytest.mark.parametrize("kind", KINDS_TRAINED)
def test_a_new_project_is_tried_and_trained(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "my_project"
    command("init", str(folder), "--kind", kind)
    shown = command("try", str(folder / "configuration.toml"), "--responses", "2")
    assert "response 2 of 2" in shown
    said = from_python(folder)
    line = metrics(folder / "run")[1]
    assert f"\n{folder}/run {line['reward/mean']}\n" in said
    evaluated = json.loads((folder / "run/evaluations/afterwards/results.json").read_text())
    estimate = evaluated[0]["statistics"]["pass_at_k"]["8"]
    assert said.endswith(f"\n{estimate['mean']} {estimate['low']}\n")
    own = {"reward": "reward/numbers", "method": "loss/overconfident", "environment": "reward/tries"}
    assert line[own[kind]] > 0
    assert list((folder / "run/model").glob("*.safetensors"))
