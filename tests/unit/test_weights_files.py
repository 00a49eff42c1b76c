"""HF weight files that are missing, cut, or do not fit, and the refusals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rapo.errors import RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.weights import hf_check
from megatron_rapo.weights.hf_check import check_tensors
from megatron_rapo.weights.hf_directory import write_companions
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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_files_that_were_closed_take_no_memory_and_can_be_read_again(split: Path) -> None:
    def mapped() -> bool:
        return str(split) in Path("/proc/self/maps").read_text()

    with HFTensors(split) as tensors:
        before = tensors.read(NAME, None, 0, 0).clone()
        assert mapped()
        tensors.close_files()
        assert not mapped()
        assert torch.equal(tensors.read(NAME, None, 0, 0), before)
    assert not mapped()


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


def test_a_parameter_of_another_shape_is_refused(original: Path) -> None:
    with pytest.raises(
        RapoError, match=r"lm_head\.weight .* has shape \[61, 64\], which does not fit config\.json"
    ):
        load_weights([Head(61, 32)], read_architecture(original), original, tensor_rank=0)


@pytest.mark.parametrize("size", [63, 65])
def test_only_the_vocabulary_is_padded(original: Path, size: int) -> None:
    norm = torch.nn.ModuleDict(
        {"decoder": torch.nn.ModuleDict({"final_layernorm": torch.nn.LayerNorm(size, bias=False)})}
    )
    with pytest.raises(RapoError, match=r"model\.norm\.weight .* has shape \[64\], which does not fit"):
        load_weights([norm], read_architecture(original), original, tensor_rank=0)


def test_weights_of_another_vocabulary_are_refused(original: Path) -> None:
    architecture = replace(read_architecture(original), vocabulary=64)
    with pytest.raises(
        RapoError, match=r"embed_tokens.* has shape \[61, 64\], config\.json makes it \[64, 64\]"
    ):
        load_weights([Head(64, 64)], architecture, original, tensor_rank=0)


# What is in the files beside the architecture's tensors, and what is said of it.


def edited(path: Path, change: Callable[[dict[str, torch.Tensor]], object], **options: Any) -> Path:
    """A model of one layer whose tensors were changed."""
    make_hf_model(path, num_hidden_layers=1, **options)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def check(path: Path) -> None:
    with HFTensors(path) as tensors:
        check_tensors(tensors, read_architecture(path))


def embedding_as_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_a_tied_models_head_may_be_in_its_file_if_it_is_the_embedding(tmp_path: Path) -> None:
    check(edited(tmp_path, embedding_as_head, tied=True))


@pytest.mark.parametrize("row", [0, 15, 16, 60])
def test_a_tied_model_with_a_head_of_its_own_is_refused(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        embedding_as_head(tensors)
        tensors["lm_head.weight"][row, 63] += 1e-6

    monkeypatch.setattr(hf_check, "BLOCK_ROWS", 16)
    model = edited(tmp_path, change, tied=True)
    message = (
        rf"lm_head.weight is not model.embed_tokens.weight \(row {row} is .*; set tie_word_embeddings = false"
    )
    with pytest.raises(RapoError, match=message):
        check(model)
    with pytest.raises(RapoError, match=message):
        load_weights([Head(61, 64)], read_architecture(model), model, tensor_rank=0)


def test_a_tied_models_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = edited(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(62, 64)}), tied=True)
    with pytest.raises(RapoError, match=r"lm_head.weight .* has shape \[62, 64\], config.json makes it \[61"):
        check(model)


def test_a_head_that_is_not_there_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = edited(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(RapoError, match=r"no tensor lm_head.weight; .*set tie_word_embeddings = true there"):
        check(model)


@pytest.mark.parametrize(
    ("theta", "dtype", "fits"),
    [(10000.0, torch.float32, True), (10000.0, torch.bfloat16, True), (20000.0, torch.float32, False)],
)
def test_rotary_frequencies_are_compared(
    tmp_path: Path, theta: float, dtype: torch.dtype, fits: bool
) -> None:
    frequencies = 1.0 / theta ** (torch.arange(0, 16, 2) / 16)  # as transformers writes it
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    model = edited(tmp_path, lambda tensors: tensors.update({name: frequencies.to(dtype)}))
    with (
        nullcontext()
        if fits
        else pytest.raises(RapoError, match=r"inv_freq .* is not what rope_theta = 10000")
    ):
        check(model)


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    model = edited(tmp_path, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}))
    with pytest.raises(
        RapoError, match=r"down_proj.weight .* is of type I8, .*: quantized weights cannot be"
    ):
        check(model)


def index(folder: Path, **changes: str | None) -> Path:
    """Changes which file the index names for a tensor; None takes it out."""
    file = folder / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"] | changes
    file.write_text(json.dumps({"weight_map": {k: v for k, v in weight_map.items() if v is not None}}))
    return folder


@pytest.mark.parametrize("file", ["part-0.safetensors", "part-1.safetensors"])
def test_an_index_that_names_the_wrong_file_is_refused(split: Path, file: str) -> None:
    right = json.loads((split / "model.safetensors.index.json").read_text())["weight_map"][NAME]
    with HFTensors(index(split, **{NAME: file})) as tensors:
        if file == right:
            tensors.check_index()
            return
        with pytest.raises(RapoError, match=rf"{NAME} is in {file}, which has it not; copy index and files"):
            tensors.shape(NAME)
        with pytest.raises(RapoError, match=rf"{NAME} is in {file}, and .* it; copy index and files again"):
            tensors.check_index()


def test_a_tensor_that_the_index_leaves_out_is_refused(split: Path) -> None:
    with (
        HFTensors(index(split, **{NAME: None})) as tensors,
        pytest.raises(RapoError, match=rf"tensor {NAME} is in no file, and part-.\.safetensors holds it;"),
    ):
        tensors.check_index()


def test_weights_that_are_there_twice_are_refused(split: Path, original: Path) -> None:
    shutil.copyfile(original / "model.safetensors", split / "model.safetensors")
    with pytest.raises(RapoError, match=r"holds its weights twice: .*remove the one that is out of date"):
        HFTensors(split)


COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model.v3",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "qwen.tiktoken",
    "spiece.model",
    "additional_chat_templates/rag.jinja",
)
LEFT = ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "common.pt", "README.md")


def test_all_that_belongs_to_tokenizer_and_configuration_is_carried_along(tmp_path: Path) -> None:
    for name in (*COMPANIONS, *LEFT):
        file = tmp_path / "from" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    (tmp_path / "to").mkdir()
    write_companions(tmp_path / "to", tmp_path / "from", {NAME: "model.safetensors"})
    carried = {str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*") if p.is_file()}
    assert carried == {*COMPANIONS, "model.safetensors.index.json"}
    assert json.loads((tmp_path / "to/model.safetensors.index.json").read_text())["weight_map"]
