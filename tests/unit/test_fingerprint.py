"""Fingerprints differ where contents do, wherever these lie, and large models take no time."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rapo import fingerprint as module
from megatron_rapo.fingerprint import fingerprint, tokenizer_fingerprint, weights_fingerprint


def test_texts_are_told_apart_also_where_they_join_alike() -> None:
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert fingerprint(["a", "b"]) != fingerprint(["b", "a"])
    assert fingerprint([(1, 2)]) == fingerprint([(1, 2)])


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a large one is read: by its header and places in each tensor."""
    monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    tensors = {"a": torch.zeros(4096), "b": torch.ones(2, 512), "c": torch.zeros(1)}
    save_file(tensors, path / "model.safetensors")
    return path


def test_the_same_model_elsewhere_is_the_same(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert weights_fingerprint(tmp_path / "copy") == weights_fingerprint(model)


@pytest.mark.parametrize("change", ["a beginning", "a middle", "b end", "c whole", "names", "config"])
def test_another_model_is_another_one(model: Path, change: str) -> None:
    before = weights_fingerprint(model)
    tensors = {"a": torch.zeros(4096), "b": torch.ones(2, 512), "c": torch.zeros(1)}
    name, _, where = change.partition(" ")
    if where:
        values = tensors[name].view(-1)
        place = {"beginning": 0, "middle": len(values) // 2 + 1, "end": -1, "whole": 0}[where]
        values[place] = 2
    if change == "names":
        tensors = {"b": tensors["b"], "c": tensors["c"], "d": tensors["a"]}
    if change == "config":
        (model / "config.json").write_text('{"rope_theta": 1}')
    save_file(tensors, model / "model.safetensors")
    assert weights_fingerprint(model) != before


def test_little_of_a_large_file_is_read(model: Path) -> None:
    """A change between the places goes unseen, as documented: the price of a second."""
    before = weights_fingerprint(model)
    with (model / "model.safetensors").open("r+b") as file:
        header = struct.unpack("<Q", file.read(8))[0]
        start = json.loads(file.read(header))["a"]["data_offsets"][0]
        file.seek(8 + header + start + 200)
        file.write(b"\1")
    assert weights_fingerprint(model) == before


def test_a_damaged_file_has_one_too(model: Path) -> None:
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    assert len(weights_fingerprint(model)) == 16


def test_a_large_file_that_is_no_safetensors_is_read_in_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WHOLE_BYTES", 100)
    file = tmp_path / "__0_0.distcp"
    content = bytearray(50_000)
    found = []
    for place in (None, 0, 25_000, -1):
        changed = bytearray(content)
        if place is not None:
            changed[place] = 1
        file.write_bytes(changed)
        found.append(module.files_fingerprint([file]))
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ],
)
def test_a_tokenizer_is_all_its_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("one")
    before = tokenizer_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_text("weights")
    assert tokenizer_fingerprint(tmp_path) == before
    (tmp_path / name).write_text("two")
    assert tokenizer_fingerprint(tmp_path) != before
