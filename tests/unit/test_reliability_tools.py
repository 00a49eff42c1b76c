"""tools/crash_test.py, hang_times.py and soak.py: what they compare, count and tell, without a run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # scripts beside the package, not a part of it
import crash_test
import hang_times
import soak
from crashes.cells import CELLS
from crashes.comparing import contents, differences
from crashes.run import MARK, Run


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def a_run(directory: Path) -> Path:
    write_lines(directory / "metrics.jsonl", {"step": 1, "loss/total": 0.5, "time/step_s": 1.0})
    for folder in ("model", "samples", "evaluations/step_000001", "checkpoints/step_000001"):
        (directory / folder).mkdir(parents=True)
    (directory / "model/model.safetensors").write_bytes(b"weights")
    for folder in ("samples", "evaluations/step_000001"):
        pyarrow.parquet.write_table(pyarrow.table({"token": [1, 2]}), directory / folder / "part.parquet")
    (directory / "checkpoints/step_000001/run.json").write_text('{"state": {"step": 1}, "saved": 3}')
    (directory / "checkpoints/step_000001/__0_0.distcp").write_bytes(b"moments")
    return directory


def test_whatever_a_run_computed_is_compared_and_times_are_not(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    expected = contents(run)
    write_lines(run / "metrics.jsonl", {"step": 1, "loss/total": 0.5, "time/step_s": 9.0})
    assert differences(expected, contents(run)) == []
    changes = {
        "metrics.jsonl": ('{"step": 1, "loss/total": 0.6}\n', "metrics of step 1"),
        "model/model.safetensors": ("weighty", "model/model.safetensors"),
        "checkpoints/step_000001/run.json": ('{"state": {"step": 2}}', "last checkpoint"),
        "checkpoints/step_000001/__0_0.distcp": ("momentt", "step_000001/__0_0.distcp"),
        "model/more": ("", "model/more"),
    }
    for name, (text, told) in changes.items():
        before = (run / name).read_bytes() if (run / name).exists() else None
        (run / name).write_text(text)
        assert differences(expected, contents(run)) == [told]
        (run / name).unlink() if before is None else (run / name).write_bytes(before)
    for folder in ("samples", "evaluations/step_000001"):
        table = pyarrow.table({"token": [1, 3]})
        pyarrow.parquet.write_table(table, run / folder / "part.parquet")
    assert differences(expected, contents(run)) == [
        "evaluations/step_000001/part.parquet",
        "samples/part.parquet",
    ]


def test_kills_are_counted_by_the_phase_that_they_met(tmp_path: Path) -> None:
    kill = {"does": "SIGKILL", "victim": "a rank", "phase": "update"}
    write_lines(
        tmp_path / "disturbances.jsonl",
        {**kill, "in": "update", "gone_s": 2.0, "differences": 0},
        {**kill, "in": "publish", "gone_s": 4.0, "differences": 0},
        {**kill, "in": "publish", "gone_s": 3.0, "differences": 2},
        {**kill, "in": "", "differences": 0},
        {**kill, "in": "publish", "missed": True, "differences": 0},
    )
    header, _, row, _, told = crash_test.table(tmp_path).splitlines()
    assert header == "|  | before the first | update | publish | all |"
    assert row == "| SIGKILL, a rank | 1 of 1 | 1 of 1 | 1 of 2 | 3 of 4 |"
    assert told == (
        "3 of 4 disturbances ended in the same bytes; "
        "after a SIGKILL no process was left within 3 s (median), 4 s (most)."
    )


def test_a_command_that_was_ended_goes_on_with_the_runs_that_are_left(tmp_path: Path) -> None:
    every = dict(crash_test.undone(tmp_path, CELLS, 1))
    assert sorted(cell.phase for own in every.values() for cell in own) == sorted(c.phase for c in CELLS)
    write_lines(tmp_path / "runs.jsonl", {"seed": 1, "run": 0}, {"seed": 2, "run": 1})
    assert dict(crash_test.undone(tmp_path, CELLS, 1)) == {n: own for n, own in every.items() if n != 0}
    assert dict(crash_test.undone(tmp_path, CELLS, 1, only=[0, 2, 3])) == {n: every[n] for n in (2, 3)}


@pytest.mark.parametrize(("named", "after"), [(True, "12.5 s"), (False, "not at all")])
def test_hangs_are_told_with_their_limits(named: bool, after: str) -> None:
    line = {"case": 1, "does": "SIGSTOP", "victim": "a rank", "phase": "update", "named": named}
    line |= {"seconds": 12.5, "bound_s": 20.0, "limit_s": 40.0, "said": "no progress: …"}
    assert hang_times.table([line]).splitlines()[-1] == (
        f"| SIGSTOP, a rank | update | {after} | 40 s | 20 s | no progress: … |"
    )


def test_the_patterns_of_hangs_find_what_a_report_says() -> None:
    report = (
        "no progress: rank 0 has been in annotate of step 3 for 61 s, over the bound of 60 s (its longest)\n"
        "where the ranks are (run/heartbeat):\nrank 0 waits in all_reduce, for rank 1\n"
        "rank 1 holds up the others\nrank 1 does not answer: its process is stopped\n"
    )
    patterns = {(case.does, case.victim): case.named for case in hang_times.CASES}
    for who in (("SIGSTOP", "a rank"), ("sleeps", "a rank")):
        found = re.search(patterns[who], report)
        assert found is not None and found[1] == "60"
    assert re.search(patterns["calls another collective", "a rank"], report) is None


def test_what_grows_is_told_with_its_slope(tmp_path: Path) -> None:
    """Over two starts with a day between them; the first minutes of each do not count."""
    notes = []
    for first in (0.0, 86400.0):
        for age in range(0, 1200, 10):
            grown = (age - 600) / 3600 * 60 if age > 600 else 500.0  # 60 MiB an hour
            growing = {"ranks: memory MiB": 100 + grown + first / 3600 * 60, "ranks: open files": 40}
            notes.append(
                {"age_s": age, "time": first + age, "step": age, **growing, "killed engines: threads": 1}
            )
    write_lines(tmp_path / "samples.jsonl", {"killed": "engine", "time": 5.0}, *notes)
    write_lines(tmp_path / "run/metrics.jsonl", *({"step": n, "time/step_s": 1.0} for n in range(2400)))
    write_lines(tmp_path / "run/guards.jsonl", {"guard": "mismatch"})
    _, _, memory, files, steps, _, told = soak.table(tmp_path, 600.0).splitlines()
    assert memory.startswith("| ranks: memory MiB | ") and "| +60 | +60 to +60 |" in memory
    assert files == "| ranks: open files | 40 | +0 | +0 to +0 |"
    assert steps == "| steps: seconds | 1 | +0 | +0 to +0 |"
    assert told == (
        "40 minutes, 2400 steps; killed: {'engine': 1}; slopes over 118 notes after 10 minutes; "
        "guards: {'mismatch': 1}"
    )


def test_memory_is_noted_of_each_rank_by_itself(tmp_path: Path) -> None:
    """One of them holds 64 MiB more than the other."""
    run = Run(tmp_path, None)
    run.mark = "a mark"
    holding = "held = bytearray({}); print(1, flush=True); input()"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", holding.format(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, MARK: run.mark},
        )
        for size in (0, 64 << 20)
    ]
    run.process = subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: run.mark})
    try:
        for number, rank in enumerate(ranks):
            assert rank.stdout is not None
            rank.stdout.readline()
            write_lines(
                run.directory / f"heartbeat/rank_{number:05d}.json", {"rank": number, "pid": rank.pid}
            )
        assert run.ranks() == {0: ranks[0].pid, 1: ranks[1].pid}
        noted = soak.Noted(run).now()
    finally:
        for process in (*ranks, run.process):
            process.kill()
            process.communicate()
    assert noted["rank 1: memory MiB"] - noted["rank 0: memory MiB"] == pytest.approx(64, abs=4)
    assert noted["launcher: processes"] == 1
    assert not any(name.startswith("other processes") for name in noted)
