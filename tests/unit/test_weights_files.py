"""HF weight files that are missing, cut, or do not fit, and the refusals."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import read_architecture
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.load import load_weights
from tests.models import make_hf_model

NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("weights") / "model", num_hidden_layers=1)


@pytest.fixture
def split(original: Path, tmp_path: Path) -> Path:
    """The model's weights in two files with an index."""
    tensors = load_file(original / "model.safetensors")
    files = {name: f"part-{n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tmp_path


def test_slices_are_those_of_the_whole(original: Path, split: Path) -> None:
    expected = load_file(original / "model.safetensors")[NAME]
    for folder in (original, split):
        with HFTensors(folder) as tensors:
            assert tensors.shape(NAME) == list(expected.shape)
            assert torch.equal(tensors.read(NAME, None, 0, 0), expected)
            assert torch.equal(tensors.read(NAME, 0, 3, 9), expected[3:9])
            assert torch.equal(tensors.read(NAME, 1, 5, 6), expected[:, 5:6])


def test_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        RapoError, match=r"holds no weights \(no model\.safetensors.*; download or convert them"
    ):
        HFTensors(tmp_path)


def test_a_file_that_the_index_names_must_be_there(split: Path) -> None:
    (split / "part-1.safetensors").unlink()
    with pytest.raises(RapoError, match=r"lacks part-1\.safetensors, which its index names; copy it again"):
        HFTensors(split)


def test_a_malformed_index_is_refused(split: Path) -> None:
    for text in ("{", "{}", '{"weight_map": 3}'):
        (split / "model.safetensors.index.json").write_text(text)
        with pytest.raises(RapoError, match=r"index\.json is no index of weights .*; copy it again"):
            HFTensors(split)


def test_a_cut_file_is_refused(original: Path, split: Path, tmp_path: Path) -> None:
    for name in ("part-0.safetensors", "part-1.safetensors"):
        os.truncate(split / name, 1000)
    with (
        HFTensors(split) as tensors,
        pytest.raises(RapoError, match=r"part-[01]\.safetensors cannot be read .*; copy it again"),
    ):
        tensors.shape(NAME)


def test_a_tensor_that_is_not_there_is_named(original: Path) -> None:
    with (
        HFTensors(original) as tensors,
        pytest.raises(RapoError, match=r"no tensor model\.layers\.1\..*config\.json"),
    ):
        tensors.shape("model.layers.1.mlp.down_proj.weight")


class Head(torch.nn.Module):
    """As much of a model chunk as holds one parameter."""

    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__()
        self.output_layer = torch.nn.Linear(hidden, rows, bias=False)


def test_a_shard_is_cut_and_padded(original: Path) -> None:
    expected = load_file(original / "model.safetensors")["lm_head.weight"]
    architecture = read_architecture(original)
    shards = []
    for rank in range(2):
        head = Head(31, 64)
        load_weights([head], architecture, original, tensor_rank=rank)
        shards.append(head.output_layer.weight.detach())
    assert torch.equal(torch.cat(shards), torch.cat([expected, torch.zeros(1, 64)]))


@pytest.mark.parametrize(("rows", "hidden", "vocabulary"), [(61, 32, 61), (64, 64, 64)])
def test_weights_of_another_shape_are_refused(
    original: Path, rows: int, hidden: int, vocabulary: int
) -> None:
    architecture = replace(read_architecture(original), vocabulary=vocabulary)
    with pytest.raises(
        RapoError, match=r"lm_head\.weight .* has shape \[61, 64\], which does not fit config\.json"
    ):
        load_weights([Head(rows, hidden)], architecture, original, tensor_rank=0)
