"""Runs that are killed and started again end in the bytes of one that was left alone: tools/crash_test.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

sys.path.insert(0, str(ROOT / "tools"))  # the tool is a script beside the package, not a part of it
from crash_test import EVERY_RUN, JUMPS, disturbed, runs_of  # noqa: E402
from crashes.cells import CELLS, Cell  # noqa: E402
from crashes.clock import build_clock  # noqa: E402

SEED = 1
FEW = (Cell("SIGKILL", "all ranks", "update"), Cell("SIGKILL", "launcher", "checkpoint"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the undisturbed run, once there was one."""
    return tmp_path_factory.mktemp("kills")


def test_a_run_that_is_killed_twice_computes_the_same(out: Path) -> None:
    assert disturbed(out, 0, FEW, SEED, None)["differences"] == []
    met = [json.loads(line) for line in (out / "disturbances.jsonl").read_text().splitlines()]
    assert [(line["victim"], line.get("missed", False)) for line in met] == [
        (cell.victim, False) for cell in FEW
    ]
    assert not any("left" in line for line in met), "processes"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "settings",
    [
        ["rollout.max_staleness=1"],
        ["rollout.max_staleness=2"],
        ["rollout.max_staleness=2", "rollout.partial_tokens=8"],
    ],
    ids="-".join,
)
def test_a_run_that_samples_ahead_computes_the_same(settings: list[str], tmp_path: Path) -> None:
    cells = [*(Cell("SIGKILL", "all ranks", phase) for phase in ("update", "publish", "checkpoint")), *FEW]
    assert disturbed(tmp_path, 0, cells, SEED, None, settings)["differences"] == []


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", range(-(-len(CELLS) // EVERY_RUN)))
def test_whatever_is_done_to_a_run_it_computes_the_same(out: Path, number: int) -> None:
    clock = build_clock(out)
    cells = list(runs_of([cell for cell in CELLS if clock or cell.does not in JUMPS], SEED))[number]
    jumps = any(cell.does in JUMPS for cell in cells)
    assert disturbed(out, 1 + number, cells, SEED, clock if jumps else None)["differences"] == []
