"""What `doctor` says of machines that lack something."""

from __future__ import annotations

import resource
import shutil
import socket
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rapo.cli import main
from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.errors import RapoError
from megatron_rapo.machine import examine as examining
from megatron_rapo.machine import host as hosts
from megatron_rapo.machine import links, software
from megatron_rapo.machine.finding import Finding, lines
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement
from tests.unit.one_rank import one_placement

MODEL = Path(__file__).parents[2] / "examples/models/tiny-countdown"
GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def placement() -> Iterator[Placement]:
    with one_placement() as placement:
        yield placement


def found(findings: Any) -> dict[str, Finding]:
    return {one.name: one for one in findings}


def test_a_machine_that_has_all(tmp_path: Path) -> None:
    here = found(hosts.host(tmp_path / "not/there/yet", 1000, 3000, 2))
    assert {one.verdict for name, one in here.items() if name != "confinement"} == {"ok"}
    assert f"free in {tmp_path}, 0.0 MiB are needed" in here["disk"].found


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9 * GIB, 0, 2 * GIB))
    here = found(hosts.host(tmp_path, weights=3 * GIB, checkpoint=GIB, kept=2))
    assert here["disk"].verdict == here["shared memory"].verdict == "wrong"
    assert here["disk"].remedy == "3.0 GiB are needed for checkpoints: free some, or lower checkpoint.keep"
    assert here["shared memory"].remedy.startswith(
        "3.0 GiB are needed for weights to engines on this machine"
    )
    assert found(hosts.host(tmp_path, 2 * GIB, GIB, 1))["disk"].verdict == "ok"


@pytest.mark.parametrize(("soft", "verdict"), [(4096, "ok"), (1024, "absent"), (256, "wrong")])
def test_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soft: int, verdict: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, 20000))
    here = found(hosts.host(tmp_path, 0, 0, 0))["open files"]
    assert here.verdict == verdict
    assert verdict == "ok" or "ulimit -n 20000" in here.remedy


def test_no_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    here = found(hosts.host(tmp_path, 0, 0, 0))["loopback"]
    assert (here.verdict, here.found) == ("wrong", "no connection: Cannot assign requested address")


def test_a_kernel_that_cannot_confine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "lacking", lambda _: ["Landlock (Linux 5.13, and not switched off)"])
    here = found(hosts.host(tmp_path, 0, 0, 0))["confinement"]
    assert (here.verdict, here.found) == (
        "absent",
        "the kernel has no Landlock (Linux 5.13, and not switched off)",
    )


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"renderers"}
    monkeypatch.setattr(software, "find_spec", lambda name: name if name in there else None)
    here = found(software.software())
    assert here["renderers"].verdict == "ok"
    for name, remedy in {"reasoning_gym": "[gym]", "wandb": "[wandb]", "vllm": "docs/engines.md"}.items():
        assert (here[name].verdict, remedy in here[name].remedy) == ("absent", True)
    assert "transformer-engine" not in here, "which only GPUs use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = SimpleNamespace(name="H200", total_memory=140 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    here = found(software.software())
    assert here["GPUs"].found.startswith("1: H200 of 140 GiB")
    assert here["transformer-engine"].verdict == here["apex"].verdict == "absent"


@pytest.mark.parametrize("version", [(2, 28, 3), (2, 28, 3, "rc1")])
def test_the_release_of_nccl_is_told(monkeypatch: pytest.MonkeyPatch, version: tuple[Any, ...]) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: version)
    assert software._backends() == f"collectives by gloo and NCCL {'.'.join(map(str, version))}"


def test_another_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise RapoError("megatron-core 9 is installed")

    monkeypatch.setattr(software, "check_version", refuse)
    assert found(software.software())["megatron-core"].verdict == "wrong"


def test_a_wrong_sum_is_found(placement: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    group, cpu = placement.host_group, torch.device("cpu")
    monkeypatch.setattr(links, "SECONDS", 0.01)
    assert links._group("all", group, placement, cpu).verdict == "ok"
    right = dist.all_reduce

    def one_bit_off(values: torch.Tensor, **options: Any) -> Any:
        right(values, **options)
        if values.numel() > 1:
            values[777] += 1

    monkeypatch.setattr(dist, "all_reduce", one_bit_off)
    wrong = links._group("all", group, placement, cpu)
    assert (wrong.verdict, wrong.remedy[:31]) == ("wrong", "an all-reduce gave a wrong sum:")


@pytest.mark.parametrize(("skew", "verdict"), [(0.5, "ok"), (60.0, "wrong")])
def test_clocks(placement: Placement, monkeypatch: pytest.MonkeyPatch, skew: float, verdict: str) -> None:
    now = time.time()
    clocks: Any = [(now, "node1"), (now + skew, "node2")]
    monkeypatch.setattr(Placement, "share_from_all", lambda self, mine: clocks)
    here = links._clocks(placement)
    assert here.verdict == verdict and here.found.endswith("apart on 2 machines")


def run_of(tmp_path: Path, **engine: Any) -> RunConfig:
    return validate(
        {
            "run": {"directory": str(tmp_path), "steps": 1},
            "model": {"path": str(MODEL), "dtype": "bfloat16"},
            "data": {"source": "countdown"},
            "rollout": {"prompts_per_step": 1, "max_response_tokens": 8, "engine": engine},
        },
        "test",
    )


def test_what_a_run_asks_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(examining, "host", lambda *arguments: asked.append(arguments) or [])
    monkeypatch.setattr(examining, "links", lambda layout: asked.append(layout.world_size) or [])
    config = run_of(tmp_path, kind="sglang", python="/nowhere/python")
    here = found(examining.examine(config))
    numbers = examining.count_parameters(read_architecture(MODEL))
    assert asked == [(tmp_path, 2 * numbers, 14 * numbers, 2), 1]
    assert here["sglang engines"].verdict == "wrong"
    assert "rollout.engine.python = '/nowhere/python' cannot be started" in here["sglang engines"].remedy
    given = found(examining.examine(run_of(tmp_path, kind="embedded", urls=["http://localhost:1"])))
    assert given["embedded engines"].found == "given: http://localhost:1; not asked here"


def test_a_table_says_what_is_to_be_mended() -> None:
    some = [
        Finding("a", "ok", "x"),
        Finding("bcd", "wrong", "y", "do this"),
        Finding("e", "absent", "z", "or not"),
    ]
    assert list(lines(some)) == [
        "a    ok      x",
        "bcd  wrong   y",
        "             do this",
        "e    absent  z",
        "             or not",
        "",
        "to be mended: bcd",
    ]
    assert list(lines(some[:1]))[-1] == "nothing is to be mended"


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("RANK", "WORLD_SIZE"):  # of the group above
        monkeypatch.delenv(name, raising=False)
    verdicts = ["ok", "wrong"]
    monkeypatch.setattr(examining, "examine", lambda config: [Finding("a", verdicts.pop(0), "x")])  # type: ignore[arg-type]
    assert main(["doctor"]) == 0
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "to be mended: a"
    for argument in (["--mismatch"], ["--set", "run.steps=3"]):
        assert main(["doctor", *argument]) == 1
        assert f"name a TOML file: {argument[0]} is about a run" in capsys.readouterr().err
