"""What a run says of its software: at its start, and where it goes on with another."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megatron_rapo.errors import RapoError
from megatron_rapo.observe.versions import software_versions
from megatron_rapo.record.versions import FILE, read_versions, record_versions

OLD, NEW = {"python": "3.11.2", "torch": "2.12.0"}, {"python": "3.11.2", "torch": "2.13.0", "triton": "3.9.0"}


def test_versions_are_those_of_what_is_installed() -> None:
    told = software_versions()
    assert told["python"] == platform.python_version()
    assert told["torch"] == torch.__version__
    assert told["megatron-core"] == version("megatron-core")
    assert told.get("cuda") == torch.version.cuda


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
