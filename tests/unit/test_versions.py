"""What a run says of its software: at its start, and where it goes on with another."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megatron_rapo.config import load_config
from megatron_rapo.errors import RapoError
from megatron_rapo.observe.versions import FILE, read_versions, record_versions, run_versions

OLD, NEW = {"python": "3.11.2", "torch": "2.12.0"}, {"python": "3.11.2", "torch": "2.13.0", "triton": "3.9.0"}
DEMO = Path("examples/configs/demo.toml")


def test_a_run_tells_versions_and_engines() -> None:
    told = run_versions(load_config([DEMO], []))
    assert told["python"] == platform.python_version()
    assert told["torch"] == torch.__version__
    assert told["megatron-core"] == version("megatron-core")
    assert told["engines"] == "embedded"
    assert told.get("cuda") == torch.version.cuda


def test_a_given_engine_is_not_asked_and_a_started_one_is(tmp_path: Path) -> None:
    given = run_versions(load_config([DEMO], ["rollout.urls=['http://127.0.0.1:1']"]))
    assert given["engines"] == "given by rollout.urls"
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nprint('0.5.21')\n")
    python.chmod(0o755)
    for path, expected in ((python, "sglang 0.5.21"), ("/nowhere", "sglang of unknown version")):
        config = load_config([DEMO], [f"rollout.sglang={{python='{path}'}}"])
        assert run_versions(config)["engines"] == expected


def test_only_a_change_is_added(tmp_path: Path) -> None:
    assert record_versions(tmp_path, None, OLD) == ""
    assert record_versions(tmp_path, 10, OLD) == ""
    said = record_versions(tmp_path, 20, NEW)
    assert said == "going on with other versions: torch 2.12.0 → 2.13.0, triton none → 3.9.0"
    assert [(start.step, start.versions) for start in read_versions(tmp_path)] == [(0, OLD), (20, NEW)]
    assert record_versions(tmp_path, None, NEW) == ""  # a new run in the directory
    assert [(start.step, start.versions) for start in read_versions(tmp_path)] == [(0, NEW)]
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"step": 0})])
def test_a_damaged_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(RapoError, match=r"versions\.jsonl is no record of versions"):
        record_versions(tmp_path, 1, NEW)
