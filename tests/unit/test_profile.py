"""Profiles of chosen steps: written for those alone, with the names of phases and operators."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron_rapo.observe.profile import Profiler


def profiled(folder: Path, rank: int) -> list[str]:
    """The profiles of four steps of which the second and the fourth are asked for, on rank 1."""
    observe = SimpleNamespace(profile_steps=[2, 4], profile_ranks=[1])
    config: Any = SimpleNamespace(observe=observe, run=SimpleNamespace(directory=folder))
    profiler = Profiler(cast(Any, config), rank)
    for step in range(1, 5):
        profiler.begin_step(step)
        with profiler.phase(f"phase of {step}"):
            torch.ones(8) @ torch.ones(8)
        profiler.finish_step()
    return sorted(path.name for path in (folder / "profile").glob("*"))


def test_each_step_that_is_asked_for_has_its_profile(tmp_path: Path) -> None:
    assert profiled(tmp_path, 1) == ["step_000002-rank_00001.json", "step_000004-rank_00001.json"]
    for step in (2, 4):
        trace = json.loads((tmp_path / f"profile/step_{step:06d}-rank_00001.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {"aten::ones", "aten::dot", f"phase of {step}"} <= names
        assert f"phase of {6 - step}" not in names


def test_other_ranks_have_none(tmp_path: Path) -> None:
    assert profiled(tmp_path, 0) == []


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="profile"):
        profiled(tmp_path, 1)
