"""Conversion: HF → Megatron → HF bit for bit, logits as transformers', and every refusal before a write."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rapo import file_sums
from megatron_rapo.cli import main
from megatron_rapo.convert.to_hf import convert_to_hf
from megatron_rapo.convert.to_megatron import convert_to_megatron
from megatron_rapo.errors import RapoError
from megatron_rapo.model.families.named import FAMILIES
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.megatron_files import MegatronTensors
from megatron_rapo.weights.stored_parameters import stored_parameters
from tests import own_family  # noqa: F401  (a family from outside of the package)
from tests.models import make_hf_model

ROOT = Path(__file__).parents[2]
MODELS = [(family, tied) for family in FAMILIES for tied in (False, True)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("convert") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    convert_to_megatron(model, model.with_name("megatron"))
    return model.with_name("megatron")


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_a_round_trip_changes_nothing(tmp_path: Path, family: str, tied: bool) -> None:
    model = make_hf_model(tmp_path / "model", family=family, tied=tied, dtype=torch.bfloat16)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    convert_to_megatron(model, tmp_path / "megatron")
    convert_to_hf(tmp_path / "megatron", tmp_path / "back")

    expected = load_file(model / "model.safetensors")
    with HFTensors(tmp_path / "back") as tensors:
        assert tensors.names() == expected.keys()
        for name, tensor in expected.items():
            found = tensors.read(name, None, 0, 0)
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, tensor), name
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (model, tmp_path / "back")
        )
    assert torch.equal(before, after)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").encode("1+2") == [3, 12, 4]


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_the_table_knows_every_tensor_and_its_shape(tmp_path: Path, family: str, tied: bool) -> None:
    model = make_hf_model(tmp_path / "model", family=family, tied=tied, num_hidden_layers=2)
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(model / "model.safetensors").items()}
    parameters = list(stored_parameters(read_architecture(model)))
    assert {name: shape for parameter in parameters for name, shape in parameter.rule.hf.items()} == expected


def test_the_output_is_sharded_a_file_a_layer(checkpoint: Path, tmp_path: Path) -> None:
    convert_to_hf(checkpoint, tmp_path / "back")
    weight_map = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())["weight_map"]
    layers = {file: {name for name in weight_map if weight_map[name] == file} for file in weight_map.values()}
    assert sorted(layers) == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert layers["model-00001-of-00004.safetensors"] == {"model.embed_tokens.weight"}
    assert all(name.startswith("model.layers.1.") for name in layers["model-00003-of-00004.safetensors"])


def test_megatron_lm_finds_what_it_asks_for(checkpoint: Path) -> None:
    """The tracker, the form and the common state, as Megatron-LM's load_checkpoint reads them."""
    assert (checkpoint / "latest_checkpointed_iteration.txt").read_text().strip() == "release"
    assert json.loads((checkpoint / "release/metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert torch.load(checkpoint / "release/common.pt") == {"checkpoint_version": 3.0, "iteration": 0}


@pytest.mark.parametrize("script", ["convert_hf_to_megatron.py", "convert_megatron_to_hf.py"])
def test_the_scripts_convert(model: Path, checkpoint: Path, tmp_path: Path, script: str) -> None:
    source = model if script == "convert_hf_to_megatron.py" else checkpoint
    command = [sys.executable, str(ROOT / "tools" / script), str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "MiB" in result.stderr, "progress is told"
    assert (tmp_path / "out").is_dir()


def _index(checkpoint: Path) -> Path:
    return checkpoint / "release/.metadata"


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch /tmp/rapo-evil",)


# What is done to a copy of the model or the checkpoint, and what is then said.
BROKEN_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard cut": (lambda d: os.truncate(d / "model.safetensors", 9000), "cannot be read .*; copy it again"),
    "shard gone": (lambda d: _split(d).unlink(), "lacks a.safetensors, which its index names; copy it again"),
    "tensor gone": (
        lambda d: _edit(d, drop="model.norm.weight"),
        "no tensor model.norm.weight; is config",
    ),
    "tensor more": (
        lambda d: _edit(d, add="model.experts.weight"),
        "model.experts.weight, for which qwen2",
    ),
    "tied, with another head": (
        lambda d: _configure(d, tie_word_embeddings=True),
        "lm_head.weight is not model.embed_tokens.weight .*; set tie_word_embeddings = false",
    ),
    "another config": (
        lambda d: _configure(d, intermediate_size=100),
        r"gate_proj.weight in .* has shape \[176, 64\], config.json makes it \[100, 64\]",
    ),
    "config that contradicts itself": (
        lambda d: _configure(d, num_hidden_layers=3),
        r"(?s)config.json cannot be read \(.*num_hidden_layers",
    ),
    "another family": (
        lambda d: _configure(d, model_type="gpt2"),
        "family 'gpt2'",
    ),
}
BROKEN_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard gone": (lambda d: (d / "release/__0_0.distcp").unlink(), "__0_0.distcp is missing; copy it again"),
    "shard cut": (
        lambda d: os.truncate(d / "release/__0_0.distcp", 100),
        r"damaged: __0_0.distcp has 100 of at least \d+ bytes; copy it again",
    ),
    "index cut": (lambda d: os.truncate(_index(d), 50), "no index that can be read .*; copy it again"),
    "index that runs code": (
        lambda d: _index(d).write_bytes(pickle.dumps(_Evil())),
        r"no index that can be read \(it names posix.system, which no index needs\)",
    ),
    "another form": (
        lambda d: (d / "release/metadata.json").write_text('{"sharded_backend": "zarr"}'),
        "has the form 'zarr'; save it again in Megatron's form torch_dist",
    ),
    "no configuration": (
        lambda d: (d / "release/config.json").unlink(),
        "does not tell its model's configuration and tokenizer; name the HF directory .* with --model",
    ),
    "layers": (
        lambda d: _configure(d / "release", num_hidden_layers=3, layer_types=None),
        r"of another architecture: .* has shape \[2, 64\], config.json makes it \[3, 64\]; name the HF model",
    ),
    "no biases": (
        lambda d: _configure(d / "release", model_type="llama", head_dim=16),
        r"of another architecture: llama has no decoder.layers.self_attention.linear_qkv.bias \[2, 128\]",
    ),
    "norms more": (
        lambda d: _configure(d / "release", model_type="qwen3", head_dim=16),
        "has no tensor decoder.layers.self_attention.q_layernorm.weight; name the HF model",
    ),
    "vocabulary": (
        lambda d: _configure(d / "release", vocab_size=62),
        r"word_embeddings.weight has shape \[61, 64\], config.json makes it \[62, 64\]",
    ),
}


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_broken_model_is_refused_before_anything_is_written(model: Path, tmp_path: Path, case: str) -> None:
    break_it, message = BROKEN_MODELS[case]
    shutil.copytree(model, tmp_path / "model")
    break_it(tmp_path / "model")
    with pytest.raises(RapoError, match=message):
        convert_to_megatron(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("case", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, case: str
) -> None:
    break_it, message = BROKEN_CHECKPOINTS[case]
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (tmp_path / "checkpoint/release" / file_sums.FILE).unlink()  # as of another trainer
    break_it(tmp_path / "checkpoint")
    with pytest.raises(RapoError, match=message):
        convert_to_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert not Path("/tmp/rapo-evil").exists()


def test_a_damaged_index_is_refused_whatever_it_runs_into(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    index, architecture = _index(tmp_path / "checkpoint"), read_architecture(checkpoint / "release")
    whole, random = index.read_bytes(), Random(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[random.randrange(len(whole))] = random.randrange(256)
        index.write_bytes(damaged)
        try:
            MegatronTensors(tmp_path / "checkpoint", architecture).read("model.norm.weight", None, 0, 0)
        except RapoError:
            refused += 1
    assert refused > 100


def test_a_flipped_bit_of_what_was_converted_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """In both forms: in weights it would be another model, without an error."""
    convert_to_hf(checkpoint, tmp_path / "model")
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    for file, back in ((tmp_path / "model/model-00002-of-00004.safetensors", convert_to_megatron),
                       (tmp_path / "checkpoint/release/__0_0.distcp", convert_to_hf)):  # fmt: skip
        content = bytearray(file.read_bytes())
        content[-100] ^= 4
        file.write_bytes(content)
        with pytest.raises(RapoError, match=f"{file.parent} is damaged: {file.name} has other contents"):
            back(tmp_path / file.relative_to(tmp_path).parts[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_legacy_checkpoint_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "iter_0000010/mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10\n")
    with pytest.raises(RapoError, match=r"legacy form, .*--ckpt-format torch_dist"):
        convert_to_hf(tmp_path, tmp_path / "out")
    with pytest.raises(RapoError, match="is no Megatron checkpoint"):
        convert_to_hf(tmp_path / "iter_0000010/mp_rank_00", tmp_path / "out")


def test_a_destination_that_cannot_be_is_refused(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    for destination, message in (
        (tmp_path / "file/out", "cannot be written: .*file takes no files; choose another place"),
        (tmp_path / "taken", "taken exists already; remove it, or choose another place"),
        (
            Path("/proc/out"),
            "/proc/out (cannot be written|needs).*; (free space|make room) or choose another place",
        ),
    ):
        with pytest.raises(RapoError, match=message):
            convert_to_megatron(model, destination)
        with pytest.raises(RapoError, match=message):
            convert_to_hf(checkpoint, destination)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken"}


def test_a_disk_that_becomes_full_leaves_nothing(model: Path, checkpoint: Path, tmp_path: Path) -> None:
    """In a process whose files may not grow: what it had written is removed, and the reason told."""
    for direction, source in (("to-megatron", model), ("to-hf", checkpoint)):
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000));"
            f"from megatron_rapo.cli import main; sys.exit(main(['convert', '{direction}', *sys.argv[1:]]))"
        )
        command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert result.returncode == 1
        assert "error: " in result.stderr and "cannot be written: " in result.stderr, result.stderr
        assert list(tmp_path.iterdir()) == []


def test_the_command_line_tells_errors(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "to-hf", str(model), str(tmp_path / "out")]) == 1
    assert "is no Megatron checkpoint (no metadata.json); name a run's directory" in capsys.readouterr().err


def _configure(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _edit(directory: Path, drop: str = "", add: str = "") -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop(drop, None)
    if add:
        tensors[add] = torch.zeros(2)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _split(directory: Path) -> Path:
    """Makes two files and an index of the weights; returns one of the two."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = {name: "a.safetensors" if "norm" in name else "b.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return directory / "a.safetensors"
