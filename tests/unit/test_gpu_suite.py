"""tools/gpu_suite.py: parts are written down at once, ended at their limit, and not run twice. On a CPU."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # scripts beside the package, not a part of it
import check_simulation
import gpu_suite
from gpu_suite import Part, Setting

COUNT = """
from pathlib import Path
file = Path("count")
file.write_text(file.read_text() + "1" if file.exists() else "1")
"""
CHILD = """
import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path("pid").write_text(str(child.pid))
time.sleep(600)
"""


def part(code: str, limit_s: float = 60.0) -> Part:
    """One that runs Python, and finds how often it did."""
    return Part(
        limit_s,
        lambda setting: [sys.executable, "-c", code],
        lambda setting: {"count": len((setting.results / "count").read_text())},
    )


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Part], *options: str) -> int:
    monkeypatch.setattr(gpu_suite, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", str(tmp_path), "--device", "cpu", *options])
    return gpu_suite.main()


def result(tmp_path: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((tmp_path / f"{name}.json").read_text()))


def test_a_part_that_is_done_is_not_run_again_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"one": part(COUNT), "two": part(COUNT)}
    assert run(tmp_path, monkeypatch, parts, "--parts", "one") == 0
    assert result(tmp_path, "one")["count"] == 1 and result(tmp_path, "one")["machine"]["device"] == "cpu"
    assert not (tmp_path / "two.json").exists()
    assert run(tmp_path, monkeypatch, parts) == 0
    assert result(tmp_path, "one")["count"] == 1 and result(tmp_path, "two")["count"] == 2
    assert run(tmp_path, monkeypatch, parts, "--again", "one") == 0
    assert result(tmp_path, "one")["count"] == 3


def test_results_of_another_machine_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch, {"one": part(COUNT)}) == 0
    found = result(tmp_path, "one")
    found["machine"]["device"] = "another"
    (tmp_path / "one.json").write_text(json.dumps(found))
    assert run(tmp_path, monkeypatch, {"one": part(COUNT)}) == 0
    assert result(tmp_path, "one")["count"] == 2


def test_a_failed_part_is_told_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable = Part(60.0, None, lambda setting: {"count": len((setting.results / "none").read_text())})
    parts = {"bad": part("print('so it is'); raise SystemExit(3)"), "none": unreadable, "good": part(COUNT)}
    assert run(tmp_path, monkeypatch, parts) == 2
    assert result(tmp_path, "bad")["status"] == "exit status 3 (see bad.log)"
    assert (tmp_path / "bad.log").read_text() == "so it is\n"
    assert result(tmp_path, "none")["status"].startswith("its results cannot be read: FileNotFoundError")
    assert result(tmp_path, "good")["status"] == "done"
    parts["bad"] = part(COUNT)
    run(tmp_path, monkeypatch, parts)
    assert result(tmp_path, "bad")["status"] == "done", "what failed is run again"


def test_a_part_ends_at_its_limit_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setting, "limit_s", lambda self, one: one.limit_s)
    began = time.monotonic()
    assert run(tmp_path, monkeypatch, {"slow": part(CHILD, limit_s=8.0)}) == 1
    assert time.monotonic() - began < 60
    assert result(tmp_path, "slow")["status"] == "ended at its limit of 8 s (see slow.log)"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("what the part started is still there")


def test_all_parts_fit_eight_minutes_and_the_first_three_four() -> None:
    limits = [one.limit_s for one in gpu_suite.PARTS.values()]
    assert list(gpu_suite.PARTS)[:3] == ["tests", "loss", "step"]
    assert sum(limits) <= 8 * 60 and sum(limits[:3]) <= 4 * 60


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_the_whole_suite_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", str(tmp_path), "--device", "cpu"])
    assert gpu_suite.main() == 0
    assert result(tmp_path, "tests")["skipped"] >= 3
    assert len(result(tmp_path, "loss")["to_plain"]) == 2
    step = result(tmp_path, "step")
    assert step["update_tokens_per_s"] > 0 and step["peak_gib"] > 0 and step["estimated_gib"] > 0
    assert result(tmp_path, "run")["publish/probe_difference"] < 1e-3
    assert result(tmp_path, "offload")["loss_apart"] < 1e-5
    assert any(name.startswith("mismatch/") for name in result(tmp_path, "mismatch"))


def test_the_check_of_simulations_counts_what_is_within_the_bars() -> None:
    real = {"step_s": 2.0, "idle": 0.3}
    near, slow, idle = (
        {"step_s": 1.8, "idle": 0.4},
        {"step_s": 2.5, "idle": 0.3},
        {"step_s": 2.0, "idle": 0.5},
    )
    found = {
        name: {"real": real, "simulated": simulated, "ordered": near}
        for name, simulated in {"fit": real, "near": near, "slow": slow, "idle": idle}.items()
    }
    lines = check_simulation.table(found)
    slow_line = "| slow | 2.00 s | 2.50 s (+25%) | 1.80 s (-10%) | 30% | 30% (+0) | 40% (+10) |"
    assert slow_line in lines
    assert lines[-1] == "within 15% and 15 points: 1 of 3 simulated, 3 of 3 ordered"
