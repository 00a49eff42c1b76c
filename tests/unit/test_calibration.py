"""Calibration: what is timed, and that its file is a profile."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from megatron_rapo.calibration import calibrate as calibrating
from megatron_rapo.calibration import device, engine, ranks
from megatron_rapo.calibration.timing import fastest
from megatron_rapo.cli import main
from megatron_rapo.config import Parallel
from megatron_rapo.errors import RapoError
from megatron_rapo.planning.profile import EngineRates, Link, read_profile
from megatron_rapo.scaling.devices import own_device_name
from tests.unit.one_rank import one_placement

CPU = torch.device("cpu")


def test_the_fastest_run_counts_after_the_first() -> None:
    waits = iter([0.0, 0.2, 0.05, 0.2, *[0.2] * 100])
    assert 0.05 <= fastest(lambda: time.sleep(next(waits)), seconds=0.0) < 0.2


def test_rates_are_of_the_products_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is said to take 2 seconds, so its rate is half of its operations."""
    done: list[torch.Size] = []

    def two_seconds(work: object) -> float:
        assert callable(work)
        done.append(getattr(work(), "shape", torch.Size()))
        return 2.0

    monkeypatch.setattr(device, "fastest", two_seconds)
    rates = device.matrix_rates(CPU, torch.float32)
    assert [rate.flops for rate in rates] == sorted(rate.flops for rate in rates)
    assert rates[0].flops == 2 * 8 * 32 * 32 and rates[0].flops_per_s == rates[0].flops / 2
    assert done[0] == (8, 32)
    done.clear()
    attention = device.attention_rates(CPU, torch.float32)
    assert attention[-1].flops == 4 * 6 * 32 * 1024**2  # scores, and values weighed by them
    assert done[-1] == (1, 6, 1024, 32)
    assert device.memory_bytes_per_s(CPU) == 64 * 2**20  # read and written


def test_the_disk_is_written_and_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "fastest", lambda work: [work(), 0.5][1])
    assert device.disk_bytes_per_s(tmp_path) == 2 * 32 * 2**20 / 0.5
    assert (tmp_path / "disk").stat().st_size == 32 * 2**20


def test_an_engines_step_is_told_apart_from_its_layers_and_responses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Steps that take 1 + 0.1 a layer + 0.01 for each further response."""
    monkeypatch.setattr(engine, "_engine", lambda layers, *_: layers)
    monkeypatch.setattr(engine, "_step_s", lambda layers, batch: 1 + 0.1 * layers + 0.01 * (batch - 1))
    found = engine.engine_rates(CPU, "float32", tmp_path)
    assert (found.step_s, found.layer_s, found.response_s) == pytest.approx((1, 0.1, 0.01))


def test_a_real_engine_takes_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "fastest", lambda work: fastest(work, seconds=0.0))
    one = engine._engine(2, CPU, "float32", tmp_path)
    assert 1e-6 < engine._step_s(one, 2) < 10


def test_the_command_writes_a_profile_named_after_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What takes processes or a while is given."""
    monkeypatch.chdir(tmp_path)
    link = Link(latency_s=1e-4, bytes_per_s=1e9)
    rates = EngineRates(step_s=1e-3, layer_s=2e-3, response_s=3e-5)
    monkeypatch.setattr(calibrating, "layer_and_link", lambda *_: (5e-4, link))
    monkeypatch.setattr(calibrating, "engine_rates", lambda *_: rates)
    monkeypatch.setattr(calibrating, "verifications_per_s", lambda: 500.0)
    monkeypatch.setattr(device, "fastest", lambda work: fastest(work, seconds=0.0))
    threads = torch.get_num_threads()
    assert main(["calibrate", "--dtype", "float32"]) == 0
    assert torch.get_num_threads() == threads
    [file] = tmp_path.glob("*")  # and nothing else is left
    found = read_profile(str(file))
    assert found.device == own_device_name()
    assert (found.layer_s, found.within_node, found.engine) == (5e-4, link, rates)
    assert found.between_nodes == link and "# not measured" in file.read_text()
    assert str(file.name) in capsys.readouterr().out


def test_one_gpu_has_no_link_to_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RapoError, match="link between two GPUs"):
        calibrating.calibrate("bfloat16", tmp_path)


def test_a_rank_times_a_layer_and_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "fastest", lambda work: fastest(work, seconds=0.1))
    with one_placement():
        assert 0 <= ranks._layer_s("float32", Parallel()) < 10
        assert 1e-6 < ranks._forward_s(2, "float32", Parallel()) < 10
        assert 0 < ranks._all_reduce_s(1) < 10
