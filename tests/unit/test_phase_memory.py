"""The memory of phases: attributed as they come and go, and measured by the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_rapo.observe.phase_memory import PHASES, PhaseMemory
from megatron_rapo.observe.phases import Phases
from megatron_rapo.parallel import device

MIB = 1 << 20


def test_a_peak_belongs_to_the_phase_that_ends_with_it() -> None:
    """Before the first 9; rollout 1, its inner phase 5, and 2; between 7; update 3; again rollout 4."""
    peaks = iter([9, 1, 5, 2, 7, 3, 6, 4])
    memory = PhaseMemory(lambda: next(peaks))
    phases = Phases([memory.enter], clock=lambda: 0.0)
    with phases.phase("rollout"), phases.phase("sample"):
        pass
    with phases.phase("update"):
        pass
    with phases.phase("rollout"):
        pass
    assert dict(zip(PHASES, memory.take(), strict=True)) == {
        "rollout": 5,
        "annotate": 0,
        "update": 3,
        "publish": 0,
        "checkpoint": 0,
    }
    assert memory.take() == [0] * 5
    assert memory.most == 9


def test_a_peak_that_cannot_be_told_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "_STATUS", tmp_path / "none")
    assert device.take_peak_memory() is None
    memory = PhaseMemory(device.take_peak_memory)
    memory.enter(1, "rollout")
    memory.enter(1, "between phases")
    assert memory.take() == [0] * 5 and memory.most == 0


def test_the_kernel_tells_the_most_since_it_was_asked() -> None:
    before, _ = device.take_peak_memory(), torch.ones(1)
    held = torch.ones(96 * MIB // 4)
    del held
    after, rest = device.take_peak_memory(), device.take_peak_memory()
    assert before is not None and after is not None and rest is not None
    assert after - rest > 64 * MIB
