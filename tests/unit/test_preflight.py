"""What is refused before anything is started, and the plan that `--dry-run` prints."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rapo import file_sums, preflight
from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.load import validate
from megatron_rapo.convert.to_megatron import convert_to_megatron
from megatron_rapo.errors import RapoError
from megatron_rapo.model.parameters import count_parameters
from megatron_rapo.reward import golds
from megatron_rapo.reward.trial import RESPONSE
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
            "exceeds the model's max_position_embeddings = 512; lower rollout.max_response_tokens to 480, ",
        ),
        (
            {"rollout": {"max_response_tokens": 1_000_000_000}},
            "= 1000000032 exceeds the model's max_position_embeddings = 512; lower rollout",
        ),
        (
            {"rollout": {"max_prompt_tokens": 1_000_000_000}},
            "= 1000000064 exceeds the model's max_position_embeddings = 512; lower rollout.max_prompt_tokens",
        ),
        (
            {"algorithm": {"max_tokens_per_microbatch": 95}},
            "microbatch = 95 cannot hold rollout.max_prompt_tokens + rollout.max_response_tokens = 96 "
            "tokens (96 padded); raise it to 96",
        ),
        (
            {
                "algorithm": {"max_tokens_per_microbatch": 99},
                "rollout": {"max_response_tokens": 65},
                "parallel": {"context_parallel": 2},
            },
            "= 97 tokens (100 padded); raise it to 100",
        ),
        (
            {
                "rollout": {"prompts_per_step": 1_000_000_000},
                "algorithm": {"minibatch_prompts": 1_000_000_000},
            },
            "; training problems of seed 1234), and a step would have copies of them; lower it to 10000",
        ),
        (
            {"data": {"source": "arithmetic", "problems": 7}},
            "rollout.prompts_per_step = 8 is more than the 7 prompts",
        ),
        (
            {"rollout": {"engine": {"device": "cuda"}}},
            'rollout.engine.device = "cuda" needs a GPU, and torch sees none; set "cpu", or give urls',
        ),
        (
            {"model": {"reference_in_host_memory": True}},
            "model.reference_in_host_memory = true needs a GPU, and torch sees none",
        ),
        (
            {
                "model": {"dtype": "bfloat16"},
                "optimizer": {"in_host_memory_during_rollouts": True},
            },
            "optimizer.in_host_memory_during_rollouts = true needs a GPU, and torch sees none",
        ),
        (
            {"rollout": {"engine": {"kind": "sglang", "python": "/nowhere/python"}}},
            "rollout.engine.python = '/nowhere/python' cannot be started: [Errno 2] No such file",
        ),
        (
            {"rollout": {"engine": {"kind": "sglang", "python": sys.executable}}},
            "has no package sglang; set it to the interpreter of the environment that SGLang is installed in",
        ),
        (
            {"rollout": {"engine": {"kind": "vllm", "python": sys.executable}}},
            "has no package vllm; set it to the interpreter of the environment that vLLM is installed in",
        ),
        (
            {"rollout": {"engine": {"kind": "vllm", "tensor_parallel": 3}}},
            "rollout.engine.tensor_parallel = 3 does not divide the model's 4 attention heads",
        ),
        (
            {"observe": {"wandb": "offline", "wandb_project": "p"}},
            'observe.wandb = "offline" needs wandb: pip install wandb, or set it to "off"',
        ),
        (
            {"data": {"source": "file", "path": "/nowhere/x.jsonl"}},
            "/nowhere/x.jsonl does not exist; correct data.path",
        ),
        (
            {"algorithm": {"method": "hpt"}},
            "method \"hpt\" reads the column 'solution' of problems, which no row of data has",
        ),
        (
            {"evaluate": {"problems": 4, "data": {"source": "file", "path": "/nowhere/y.jsonl"}}},
            "/nowhere/y.jsonl does not exist; correct evaluate.data.path",
        ),
        ({"model": {"reference_path": "/nowhere/reference"}}, "/nowhere/reference does not exist; download"),
        (
            {"model": {"path": "/nowhere/model"}},
            "/nowhere/model has no config.json; name a HF model directory",
        ),
    ],
)
def test_an_impossible_run_is_refused(
    tmp_path: Path,
    model: Path,
    sections: dict[str, dict[str, Any]],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RapoError, match=re.escape(message)):
        preflight.check(config(tmp_path, model, **sections))


def test_experts_are_refused_where_engines_do_not_take_them_and_planned_elsewhere(tmp_path: Path) -> None:
    mixture = make_hf_model(tmp_path / "model", family="qwen3_moe")
    spread = {"parallel": {"data_parallel": 2, "expert_parallel": 2}}
    plan = preflight.describe_plan(config(tmp_path, mixture, **spread))
    assert "2 trainer ranks: TP 1 × PP 1 × CP 1 × DP 2, EP 2\nqwen3_moe of" in plan
    sent = re.findall(r"^trainer rank (\d): ([\d.]+) MiB, by", plan, re.M)
    assert [rank for rank, _ in sent] == ["0", "1"], "each rank sends its own experts"
    vllm = {"engine": {"kind": "vllm", "urls": ["http://engine:1"]}}
    with pytest.raises(RapoError, match=r'kind = "vllm" is not known to take .* a qwen3_moe has; choose "sg'):
        preflight.planned_architecture(config(tmp_path, mixture, rollout=vllm))


def test_windows_are_refused_where_an_engine_attends_to_everything(tmp_path: Path) -> None:
    """Unless no sequence is longer; SGLang computes those of Gemma 3 and OLMo 3."""
    sglang = {"engine": {"kind": "sglang", "urls": ["http://engine:1"]}}
    run = config(tmp_path, tmp_path / "mistral", rollout=sglang)
    longest = run.longest_sequence
    make_hf_model(tmp_path / "mistral", family="mistral", sliding_window=longest - 1)
    refused = (
        f'kind = "sglang" computes no windows of a mistral, whose sliding_window = {longest - 1} is shorter'
    )
    with pytest.raises(RapoError, match=refused):
        preflight.planned_architecture(run)
    preflight.planned_architecture(config(tmp_path, tmp_path / "mistral"))
    make_hf_model(tmp_path / "whole", family="mistral", sliding_window=longest)
    preflight.planned_architecture(config(tmp_path, tmp_path / "whole", rollout=sglang))
    make_hf_model(tmp_path / "olmo3", family="olmo3", sliding_window=longest - 1)
    preflight.planned_architecture(config(tmp_path, tmp_path / "olmo3", rollout=sglang))


def test_spread_experts_of_a_dense_model_are_refused(tmp_path: Path, model: Path) -> None:
    layout = {"data_parallel": 2, "expert_parallel": 2}
    with pytest.raises(RapoError, match="expert_parallel has no effect: a qwen2 has no experts"):
        preflight.check(config(tmp_path, model, parallel=layout))


def test_a_reference_of_another_shape_is_refused(tmp_path: Path, model: Path) -> None:
    other = make_hf_model(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(RapoError, match=f"{other} is not of the architecture of {model}"):
        preflight.check(config(tmp_path, model, model={"reference_path": str(other)}))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of the policy's tokens with spare rows of its own, and such as will not do."""
    base = tmp_path_factory.mktemp("teachers")
    make_hf_model(base / "deep", family="qwen3", num_hidden_layers=6, vocab_size=61)
    make_hf_model(base / "odd", num_hidden_layers=3)
    make_hf_model(base / "short", max_position_embeddings=64)
    make_hf_model(base / "other", vocab_size=59)
    return base


def with_teacher(base: Path, model: Path, teacher: Path, **sections: dict[str, Any]) -> RunConfig:
    method = {"algorithm": {"method": "distill"}, "teacher": {"path": str(teacher)}}
    return config(base, model, **{**method, **sections})


def test_a_teacher_of_another_shape_is_planned_with(tmp_path: Path, model: Path, teachers: Path) -> None:
    run = with_teacher(tmp_path, model, teachers / "deep")
    preflight.check(run)
    plan = preflight.describe_plan(run)
    assert "teacher: qwen3 of " in plan
    assert re.search(r"^teacher +0\.\d\d GiB$", plan, re.MULTILINE)


@pytest.mark.parametrize(
    ("teacher", "layout", "wrong"),
    [
        ("odd", {"pipeline_parallel": 2}, "= 2 does not divide the teacher's 3 layers"),
        ("short", {}, "= 96 exceeds the teacher's max_position_embeddings = 64"),
        ("other", {}, "id 59 is the policy's 'J' and the teacher's nothing, and 1 more differ"),
        ("nowhere", {}, "nowhere does not exist; download the model there"),
    ],
)
def test_a_teacher_that_will_not_do_is_refused(
    tmp_path: Path, model: Path, teachers: Path, teacher: str, layout: dict[str, Any], wrong: str
) -> None:
    with pytest.raises(RapoError, match=re.escape(wrong)):
        preflight.check(with_teacher(tmp_path, model, teachers / teacher, parallel=layout))


def test_weights_that_are_not_there_are_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((model / "config.json").read_text())
    with pytest.raises(RapoError, match=r"bare holds no weights .*; download or convert them"):
        preflight.check(config(tmp_path, tmp_path / "bare"))


def test_weights_that_are_not_as_they_were_written_are_refused(tmp_path: Path, model: Path) -> None:
    """By checksums, where they have some; of a Megatron checkpoint that the run begins with, too."""
    shutil.copytree(model, tmp_path / "model")
    convert_to_megatron(model, tmp_path / "megatron")
    from_checkpoint = {"path": str(model), "checkpoint": str(tmp_path / "megatron")}
    runs = {
        tmp_path / "model": config(tmp_path, tmp_path / "model"),
        tmp_path / "megatron/release": config(tmp_path, model, model=from_checkpoint),
    }
    file_sums.write_sums(tmp_path / "model")
    for folder, run in runs.items():
        preflight.check(run)
        file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[-8] ^= 1
        file.write_bytes(content)
        with pytest.raises(RapoError, match=f"{folder} is damaged: {file.name} has other contents .* remove"):
            preflight.check(run)


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
    parameters = count_parameters(preflight.planned_architecture(planned))
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


def rows(path: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    """A file with these rows, as a table of the configuration."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "file", "path": str(path), "template": "plain", "template_text": "{prompt}"}


PROBLEM = {"question": "1+1", "answer": "2"}


def test_golds_are_judged_once_a_job(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its main rank, for it can take a minute: not by each process that looks at the data before."""
    asked: list[list[str]] = []
    monkeypatch.setattr(golds, "_judge", lambda _, data, told: asked.append(list(told)) or [None] * len(told))
    run = config(tmp_path, model, data=rows(tmp_path / "good.jsonl", *[PROBLEM] * 8))
    preflight.check(run)
    assert asked == []
    preflight.describe_plan(run)
    assert asked == [["2"] * 8]


def test_a_wrong_column_is_found_before_anything_starts(tmp_path: Path, model: Path) -> None:
    good = rows(tmp_path / "good.jsonl", *[PROBLEM] * 8)
    bad = rows(tmp_path / "bad.jsonl", {"problem": "1+1", "answer": "2"})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data": bad}, r"no field 'question'; set data\.prompt_field to one of its fields: answer, problem"),
        (
            {"data": good, "evaluate": {"data": bad}},
            r"no field 'question'; set evaluate\.data\.prompt_field to one of its fields",
        ),
        (
            {"data": good, "evaluate": {"data": [good, bad]}},
            r"no field 'question'; set evaluate\.data\[1\]\.prompt_field to one of its fields",
        ),
    ]
    for sections, message in cases:
        with pytest.raises(RapoError, match=message):
            preflight.check(config(tmp_path, model, **sections))
        with pytest.raises(RapoError, match=message):
            preflight.describe_plan(config(tmp_path, model, **sections))
        later = {"path": str(tmp_path / "later"), "config": str(model / "config.json")}
        with pytest.raises(RapoError, match=message):
            preflight.describe_plan(config(tmp_path, model, model=later, **sections))


def test_weights_of_another_shape_are_found_before_anything_starts(tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model", num_hidden_layers=1)
    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**said, "intermediate_size": 88}))
    for check in (preflight.check, preflight.describe_plan):
        with pytest.raises(
            RapoError, match=r"gate_proj.weight .* has shape \[176, 64\], config.json makes it \[88"
        ):
            check(config(tmp_path, model))


def test_the_plan_tells_what_becomes_of_the_data(tmp_path: Path, model: Path) -> None:
    training = rows(tmp_path / "t.jsonl", *[{**PROBLEM, "id": n} for n in range(8)], {"question": "2"})
    held_out = rows(tmp_path / "h.jsonl", PROBLEM, {"question": "1" * 99, "answer": "1"})
    planned = config(tmp_path, model, data=training, evaluate={"data": held_out, "samples": 2, "k": [1]})
    plan = preflight.describe_plan(planned)
    assert f"data: {tmp_path}/t.jsonl: 8 prompts from 9 rows\n  dropped 1 without an answer: rows 8" in plan
    assert f"evaluate.data: {tmp_path}/h.jsonl: 1 prompts from 2 rows" in plan
    assert "dropped 1 longer than 32 tokens: rows 1" in plan
    here = config(
        tmp_path,
        tmp_path / "later",
        model={"config": str(model / "config.json")},
        data=training,
        evaluate={"data": {**held_out, "path": "/nowhere/h.jsonl"}, "samples": 2, "k": [1]},
    )
    plan = preflight.describe_plan(here)
    assert f"data: {tmp_path}/t.jsonl: 9 rows, no tokenizer to count their tokens with" in plan
    assert "not on this machine, so not checked: /nowhere/h.jsonl" in plan


def test_the_plan_tells_what_this_machine_lacks(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    planned = config(
        tmp_path,
        model,
        rollout={"engine": {"device": "cuda"}, "responses_per_prompt": 10_000_000},
        observe={"wandb": "online", "wandb_project": "p"},
    )
    plan = preflight.describe_plan(planned)
    assert 'not on this machine: rollout.engine.device = "cuda" needs a GPU' in plan
    assert 'not on this machine: observe.wandb = "online" needs wandb: pip install wandb' in plan
    assert re.search(r"^too much for this machine: [\d.,]+ GiB of memory \(it has no GPU\)$", plan, re.M)
    assert "too much" not in preflight.describe_plan(config(tmp_path, model))


OWN = """
from megatron_rapo.episode.score import Score

def partly(response, problem):
    return Score(0.25, {"length": len(response) - problem["more"]})

def fails(response, problem):
    return problem["nothing"]

def text(response, problem):
    return "0.5"

def large(response, problem):
    return 7
"""


def rewarded(tmp_path: Path, model: Path, function: str, **sections: dict[str, Any]) -> RunConfig:
    (tmp_path / "preflight_rewards.py").write_text(OWN)
    data = rows(tmp_path / "t.jsonl", *[{"question": "1+1", "more": 4, "id": f"p{n}"} for n in range(8)])
    run = {"directory": str(tmp_path / "run"), "steps": 3, "code": [str(tmp_path)]}
    reward = {"function": f"preflight_rewards:{function}"}
    return config(tmp_path, model, run=run, data=data, reward=reward, **sections)


def test_the_plan_tries_the_reward_on_the_first_problem(tmp_path: Path, model: Path) -> None:
    """The problems need no answers."""
    plan = preflight.describe_plan(rewarded(tmp_path, model, "partly"))
    expected = (
        r"# Rewards\npreflight_rewards:partly: 0.25 for a made-up response to problem p0 of data, in [\d.]+ s"
    )
    assert re.search(expected + rf", length {len(RESPONSE) - 4}\n\n", plan)
    wanted = rewarded(tmp_path, tmp_path / "later", "partly")
    elsewhere = wanted.model.model_copy(update={"config": model / "config.json"})
    assert re.search(expected, preflight.describe_plan(wanted.model_copy(update={"model": elsewhere})))


def test_a_reward_that_fails_on_it_is_warned_of(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = rewarded(tmp_path, model, "fails")
    preflight.check(failing)
    warning = capsys.readouterr().err
    expected = (
        "preflight_rewards:fails: unknown for a made-up response to problem p0 of data, by crash (KeyError: "
        "\"problem p0 has no column 'nothing'; its columns: question, more, id\")\nTraceback"
    )
    assert warning.startswith(f"warning: {expected}")
    assert 'preflight_rewards.py", line 8, in fails' in warning
    assert expected in preflight.describe_plan(failing)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("partly_", 'has no partly_; did you mean "preflight_rewards:partly"'),
        ("text", r"preflight_rewards.py:10\) returned '0.5' \(str\) for problem p0, which is no reward"),
        (
            "large",
            'gave a made-up response the reward 7, and algorithm.method = "dapo" takes rewards from 0 to 1',
        ),
    ],
)
def test_a_reward_that_is_none_is_refused_before_anything_starts(
    tmp_path: Path, model: Path, function: str, message: str
) -> None:
    wrong = rewarded(tmp_path, model, function, algorithm={"method": "dapo"})
    for check in (preflight.check, preflight.describe_plan):
        with pytest.raises(RapoError, match=message):
            check(wrong)


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("preflight_rewards:partly", {}, "is no class with `async def run"),
        ("preflight_world:World", {"depth": 2}, r"environment.options does not fit .*preflight_world.py:1"),
        ("elsewhere", {}, 'environment.use = "elsewhere" is no environment; choose one of single_turn'),
    ],
)
def test_an_environment_that_is_none_is_refused_before_anything_starts(
    tmp_path: Path, model: Path, use: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "preflight_world.py").write_text(
        "class World:\n    async def run(self, problem, generate, seed): ...\n"
    )
    wrong = rewarded(tmp_path, model, "partly", environment={"use": use, "options": options})
    for check in (preflight.check, preflight.describe_plan):
        with pytest.raises(RapoError, match=message):
            check(wrong)
