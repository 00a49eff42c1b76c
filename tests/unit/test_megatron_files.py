"""Which Megatron checkpoint is meant by a path, and what is read of it."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_rapo.convert.to_megatron import convert_to_megatron
from megatron_rapo.errors import RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.weights.load import open_tensors
from megatron_rapo.weights.megatron_files import MegatronTensors, find_checkpoint, is_checkpoint
from tests.models import make_hf_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("files") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    convert_to_megatron(model, model.with_name("megatron"))
    return model.with_name("megatron")


def folder(path: Path, *names: str) -> Path:
    """Checkpoints of these names, which say no more than their form."""
    for name in names:
        (path / name).mkdir(parents=True)
        (path / name / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return path


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["."], "."),
        (["step_000002", "step_000010", "step_000009"], "step_000010"),
        (["step_2", "step_10", "step_9", "step_final"], "step_10"),
        (["step_999999", "step_1000000"], "step_1000000"),
        (["step_final"], "step_final"),
        (["checkpoints/step_000002", "checkpoints/step_000010"], "checkpoints/step_000010"),
    ],
)
def test_the_newest_of_a_run_is_meant(names: list[str], meant: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "run", *names)
    assert is_checkpoint(path) and find_checkpoint(path) == path / meant


@pytest.mark.parametrize(("told", "meant"), [("30\n", "iter_0000030"), ("release", "release")])
def test_the_one_that_megatrons_tracker_names_is_meant(told: str, meant: str, tmp_path: Path) -> None:
    path = folder(tmp_path, "iter_0000030", "iter_0000040", "release")
    assert not is_checkpoint(path)
    (path / "latest_checkpointed_iteration.txt").write_text(told)
    assert is_checkpoint(path) and find_checkpoint(path) == path / meant


def test_a_step_that_was_not_finished_is_none(tmp_path: Path) -> None:
    path = folder(tmp_path / "run", "step_000002")
    (path / "step_000003").mkdir()
    assert find_checkpoint(path) == path / "step_000002"
    assert not is_checkpoint(path / "step_000003")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_a_damaged_form_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(text)
    with pytest.raises(RapoError, match=r"metadata\.json is damaged .*; copy the checkpoint again"):
        find_checkpoint(tmp_path)


def test_slices_are_those_of_the_hf_file_in_any_order(model: Path, checkpoint: Path) -> None:
    architecture, expected = read_architecture(model), load_file(model / "model.safetensors")
    with open_tensors(checkpoint, architecture) as tensors:
        assert isinstance(tensors, MegatronTensors)
        for name in [*expected, *reversed(expected)]:
            values = expected[name]
            assert tensors.shape(name) == list(values.shape)
            assert torch.equal(tensors.read(name, None, 0, 0), values)
            assert torch.equal(tensors.read(name, 0, 3, 9), values[3:9])
            if values.dim() > 1:
                assert torch.equal(tensors.read(name, 1, 5, 6), values[:, 5:6])
        assert {tensors.dtype(parameter) for parameter in tensors.parameters} == {torch.float32}


def test_an_index_imports_nothing_that_it_names(
    model: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module's own code runs when it is imported, whatever is then refused."""
    (tmp_path / "named_by_an_index.py").write_text("class Innocent: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    copied = tmp_path / "checkpoint"
    copied.mkdir()
    for file in (checkpoint / "release").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / ".metadata").write_bytes(b"cnamed_by_an_index\nInnocent\n.")
    assert pickle.loads((copied / ".metadata").read_bytes()).__name__ == "Innocent"
    del sys.modules["named_by_an_index"]
    with pytest.raises(RapoError, match=r"it names named_by_an_index\.Innocent, which no index needs"):
        MegatronTensors(copied, read_architecture(model))
    assert "named_by_an_index" not in sys.modules
