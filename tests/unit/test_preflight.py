"""What is refused before anything is started, and the plan that `--dry-run` prints."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo import preflight
from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.load import validate
from megatron_rapo.errors import RapoError
from tests.models import make_hf_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("preflight") / "model", num_key_value_heads=4)


def config(base: Path, path: Path, **sections: dict[str, Any]) -> RunConfig:
    options: dict[str, dict[str, Any]] = {
        "run": {"directory": str(base / "run"), "steps": 3},
        "model": {"path": str(path), "dtype": "float32"},
        "data": {"source": "arithmetic"},
        "rollout": {"prompts_per_step": 8, "max_prompt_tokens": 32, "max_response_tokens": 64},
        "algorithm": {"max_tokens_per_microbatch": 1024, "minibatch_prompts": 4},
    }
    for name, changes in sections.items():
        options[name] = changes if "source" in changes else {**options.get(name, {}), **changes}
    return validate(options, source="test")


def test_a_possible_run_passes_and_has_its_directory(tmp_path: Path, model: Path) -> None:
    architecture = preflight.check(config(tmp_path, model))
    assert architecture.layers == 4
    assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"parallel": {"tensor_parallel": 8}},
            "tensor_parallel = 8 does not divide the model's 4 attention heads",
        ),
        (
            {"rollout": {"max_response_tokens": 500}},
            "= 532 exceeds the model's max_position_embeddings = 512; lower",
        ),
        (
            {"data": {"source": "file", "path": "/nowhere/x.jsonl"}},
            "/nowhere/x.jsonl does not exist; correct data.path or evaluate.data.path",
        ),
        (
            {"evaluate": {"problems": 4, "data": {"source": "file", "path": "/nowhere/y.jsonl"}}},
            "/nowhere/y.jsonl does not exist; correct data.path or evaluate.data.path",
        ),
        ({"model": {"reference_path": "/nowhere/reference"}}, "/nowhere/reference does not exist; download"),
        (
            {"model": {"path": "/nowhere/model"}},
            "/nowhere/model has no config.json; name a HF model directory",
        ),
    ],
)
def test_an_impossible_run_is_refused(
    tmp_path: Path, model: Path, sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(RapoError, match=re.escape(message)):
        preflight.check(config(tmp_path, model, **sections))


def test_a_reference_of_another_shape_is_refused(tmp_path: Path, model: Path) -> None:
    other = make_hf_model(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(RapoError, match=f"{other} is not of the architecture of {model}"):
        preflight.check(config(tmp_path, model, model={"reference_path": str(other)}))


def test_weights_that_are_not_there_are_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((model / "config.json").read_text())
    with pytest.raises(RapoError, match=r"bare holds no weights .*; download or convert them"):
        preflight.check(config(tmp_path, tmp_path / "bare"))


def test_a_run_directory_that_cannot_be_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "run").write_text("a file in its place")
    with pytest.raises(
        RapoError, match=r"run\.directory = .*/run cannot be made: File exists; choose another"
    ):
        preflight.check(config(tmp_path, model))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_without_write_access_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(RapoError, match=r"run\.directory = .* is not writable; choose another place"):
        preflight.check(config(tmp_path, model))


def test_the_plan_can_be_made_before_the_model_is_here(tmp_path: Path, model: Path) -> None:
    planned = config(
        tmp_path,
        tmp_path / "later",
        model={"config": str(model / "config.json")},
        parallel={"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 2},
    )
    plan = preflight.describe_plan(planned)
    parameters = preflight.planned_architecture(planned).parameters
    assert "8 trainer ranks: TP 2 × PP 2 × CP 1 × DP 2" in plan
    assert f"qwen2 of {parameters:,} parameters in 4 layers" in plan
    assert "64 responses a step in 2 updates; 6 updates in all" in plan
    assert f"not on this machine, so not checked: {tmp_path / 'later'}" in plan
    assert not (tmp_path / "run").exists(), "a plan touches nothing"


def test_the_plan_begins_with_the_whole_configuration(tmp_path: Path, model: Path) -> None:
    planned = config(tmp_path, model)
    file = tmp_path / "plan.toml"
    file.write_text(preflight.describe_plan(planned).partition("# Layout")[0])
    assert load_config([file]) == planned


def test_a_config_that_is_not_the_models_is_refused(tmp_path: Path, model: Path) -> None:
    other = {**json.loads((model / "config.json").read_text()), "num_hidden_layers": 8, "layer_types": None}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(RapoError, match=r"model .* is not of the architecture of .*other\.json"):
        preflight.check(config(tmp_path, model, model={"config": str(tmp_path / "other.json")}))
