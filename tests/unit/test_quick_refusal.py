"""A command that is given a wrong directory says so before it loads what takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("torch", "transformers", "matplotlib", "scipy.stats", "tensorboard", "megatron.core")
SCRIPT = """
import json, sys
from megatron_rapo.cli import main
status = main(json.loads(sys.argv[1]))
print(json.dumps([status, [name for name in json.loads(sys.argv[2]) if name in sys.modules]]))
"""


@pytest.mark.parametrize(
    "arguments", [["report", "nowhere"], ["compare", "nowhere", "neither"], ["samples", "nowhere"]]
)
def test_a_wrong_directory_is_refused_at_once(arguments: list[str], tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments), json.dumps(SLOW)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(found.stdout) == [1, []]
    assert "error: nowhere is no" in found.stderr


def test_what_starts_ranks_and_evaluations_does_without_megatron() -> None:
    """It takes seconds, which a refusal would wait for, and has a place in memory."""
    modules = ["preflight", "launch.local", "observe.closing", "evaluation.command", "trial.take"]
    script = f"import sys, {', '.join(f'megatron_rapo.{name}' for name in modules)}; "
    script += "print([name for name in sys.modules if name.split('.')[0] == 'megatron'])"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout == "[]\n"
