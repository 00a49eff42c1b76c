"""Configuration: files, overlays, settings, and every refusal with its key, value and remedy."""

from __future__ import annotations

import copy
import runpy
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_rapo.config import RunConfig, document, load_config, to_toml, validate
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.options import Options
from megatron_rapo.methods.rapo import RAPO

MINIMAL: dict[str, Any] = {
    "run": {"directory": "runs/first", "steps": 3},
    "model": {"path": "models/tiny"},
    "data": {"source": "countdown"},
    "rollout": {"prompts_per_step": 8, "max_response_tokens": 64},
}
FILE = {"source": "file", "path": "a.jsonl"}
MINIMAL_TOML = """
[run]
directory = "runs/first"
steps = 3
[model]
path = "models/tiny"
[data]
source = "countdown"
[rollout]
prompts_per_step = 8
max_response_tokens = 64
"""


def with_options(**options: Any) -> dict[str, Any]:
    """MINIMAL with `section__option=value` set; a dict replaces a whole section."""
    values = copy.deepcopy(MINIMAL)
    for name, value in options.items():
        section, _, option = name.partition("__")
        if option:
            values.setdefault(section, {})[option] = value
        else:
            values[section] = value
    return values


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(RapoError) as caught:
        validate(values, source="run.toml")
    return str(caught.value)


@pytest.fixture
def minimal_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL_TOML)
    return path


# Files, overlays, settings


def test_a_minimal_file_is_read(minimal_file: Path) -> None:
    config = load_config([minimal_file])
    assert config.run.directory == Path("runs/first")
    assert config.rollout.responses_per_prompt == 8
    assert config.evaluate is None


def test_later_files_overlay_earlier_ones_key_by_key(minimal_file: Path, tmp_path: Path) -> None:
    over, last = tmp_path / "over.toml", tmp_path / "last.toml"
    over.write_text("[run]\nsteps = 7\nseed = 5\n[evaluate]\nk = [1]\n")
    last.write_text("[run]\nseed = 6\n[evaluate]\nk = [2, 4]\n")
    config = load_config([minimal_file, over, last])
    assert (config.run.directory, config.run.steps, config.run.seed) == (Path("runs/first"), 7, 6)
    assert config.evaluate is not None and config.evaluate.k == [2, 4]


def test_settings_come_after_files_in_their_order(minimal_file: Path) -> None:
    config = load_config([minimal_file], ["run.steps=4", "run.steps = 5", "evaluate.problems=2"])
    assert config.run.steps == 5
    assert config.evaluate is not None and config.evaluate.problems == 2


def test_a_mapping_overlays_as_a_file_would_and_may_have_dotted_keys(minimal_file: Path) -> None:
    over = {
        "run": {"steps": 7, "seed": 5},
        "run.seed": 6,
        "run.directory": Path("elsewhere"),
        "evaluate.data": ({"source": "countdown"},),
        "rollout.responses_per_prompt": "@default",
    }
    config = load_config([minimal_file, {"rollout": {"responses_per_prompt": 3}}, over])
    assert (config.run.steps, config.run.seed, config.run.directory) == (7, 6, Path("elsewhere"))
    assert [data.source for data in config.evaluation_data] == ["countdown"]
    assert config.rollout.responses_per_prompt == 8
    assert over["run"] == {"steps": 7, "seed": 5}, "the user's own mapping is changed"
    with pytest.raises(RapoError, match=r"run\.toml, \(a mapping\) is not valid:\n  run\.stepz = 3 is not"):
        load_config([minimal_file, {"run.stepz": 3}])


def test_code_of_a_mapping_is_beside_the_files_or_here(minimal_file: Path) -> None:
    own = {"reward": {"functions": ({"use": "my_rewards:score"},)}}
    assert load_config([minimal_file, own]).run.code == [minimal_file.parent]
    whole = tomllib.loads(minimal_file.read_text())
    assert load_config([whole, own]).run.code == [Path.cwd()]


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("run.directory=runs/two=2#x", lambda c: str(c.run.directory) == "runs/two=2#x"),
        ("run.directory=2024-01-01", lambda c: str(c.run.directory) == "2024-01-01"),
        ('run.directory="a b"', lambda c: str(c.run.directory) == "a b"),
        ("algorithm.method=grpo", lambda c: c.algorithm.divergence == "k3"),
        ("algorithm.clip_high=0.28", lambda c: c.algorithm.clip_high == 0.28),
        ("optimizer.distributed=false", lambda c: c.optimizer.distributed is False),
        (
            'rollout.engine={kind = "sglang", urls = ["http://a:1", "http://b:2"]}',
            lambda c: len(c.rollout.engine.urls) == 2,
        ),
        ("evaluate.k=[1, 2]", lambda c: c.evaluate.k == [1, 2]),
        ("evaluate.data.source=countdown", lambda c: c.evaluate.data[0].source == "countdown"),
    ],
)
def test_a_setting_is_a_toml_value_or_plain_text(minimal_file: Path, setting: str, read: Any) -> None:
    assert read(load_config([minimal_file], [setting]))


@pytest.mark.parametrize(
    "setting", ["run.steps", "steps=3", "=3", ".steps=3", "run.=3", "run.steps=", "run..x=1"]
)
def test_a_malformed_setting_is_refused(minimal_file: Path, setting: str) -> None:
    with pytest.raises(
        RapoError, match=r"write section\.key=value, for example --set run\.steps=10"
    ) as caught:
        load_config([minimal_file], [setting])
    assert setting in str(caught.value)


def test_a_setting_below_a_value_is_refused(minimal_file: Path) -> None:
    with pytest.raises(RapoError, match=r"--set run\.steps\.x=1: 'steps' is a value, not a section"):
        load_config([minimal_file], ["run.steps.x=1"])


def test_a_setting_that_is_no_text_is_refused(minimal_file: Path) -> None:
    with pytest.raises(
        RapoError, match=r"--set 'run\.directory=r\\udcff': is no UTF-8 text; write it in UTF-8"
    ):
        load_config([minimal_file], ["run.directory=r\udcff"])


def test_a_setting_cannot_smuggle_a_second_option(minimal_file: Path) -> None:
    with pytest.raises(RapoError, match=r"run\.steps = "):
        load_config([minimal_file], ["run.steps=1\nseed = 3"])


def test_default_takes_an_option_back(minimal_file: Path, tmp_path: Path) -> None:
    base, over = tmp_path / "base.toml", tmp_path / "over.toml"
    base.write_text(MINIMAL_TOML + "[algorithm]\nflatten_floor = 0.8\ndivergence_coefficient = 0.1\n")
    over.write_text('[algorithm]\nmethod = "grpo"\nflatten_floor = "@default"\n')
    config = load_config([base, over], ["algorithm.divergence_coefficient=@default"])
    assert config.algorithm.method == "grpo"
    assert config.algorithm.divergence_coefficient == 0.04


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            {"method": "grppo"},
            "algorithm.method = \"grppo\" is no method; did you mean 'grpo'? ",
        ),
        ({"method": 3}, 'algorithm.method = 3: must be text; write method = "3"'),
        (
            {"flatten_floor": 0.5, "method": "grpo"},
            'algorithm.flatten_floor = 0.5 is not an option of method = "grpo"; rapo has it: ',
        ),
        (
            {"entropy_coefficient": 0.5, "method": "dapo"},
            'algorithm.entropy_coefficient = 0.5 is not an option of method = "dapo"; rapo, grpo',
        ),
        (
            {"clip_hihg": 0.5},
            'algorithm.clip_hihg = 0.5 is not an option of method = "rapo"; did you mean algorithm.clip_h',
        ),
        (
            {"preset": "grpo"},
            'algorithm.preset = "grpo" is not an option; methods are chosen by algorithm.method,',
        ),
        ({"divergence": "k3"}, "algorithm.divergence = \"k3\": must be 'forward_exact', "),
    ],
)
def test_a_method_has_its_own_options_alone(algorithm: dict[str, Any], message: str) -> None:
    assert message in refusal(with_options(algorithm=algorithm))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RapoError, match=r"nowhere\.toml does not exist; examples/configs/"):
        load_config([tmp_path / "nowhere.toml"])


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RapoError, match="cannot be read: Is a directory; give a TOML file"):
        load_config([tmp_path])


@pytest.mark.parametrize(
    "content",
    [b"x = " + b"[" * 100_000, b"[run\nsteps = 3", b"[run]\nsteps = 3\nsteps = 4", b"[run]\nx = '\xff'"],
)
def test_malformed_toml_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(RapoError, match=r"broken\.toml is not valid TOML: .+; mend it there"):
        load_config([path])


def test_errors_name_every_source(minimal_file: Path, tmp_path: Path) -> None:
    over = tmp_path / "over.toml"
    over.write_text("[run]\nstepz = 1\n")
    with pytest.raises(RapoError, match=r"run\.toml, .*over\.toml, --set is not valid"):
        load_config([minimal_file, over], ["run.seed=1"])


# Refusals of single options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (with_options(rollout__top_p=0.9), "rollout.top_p = 0.9 is not an option; rollouts sample with full"),
        (with_options(run__stepz=3), "run.stepz = 3 is not an option; did you mean run.steps?"),
        (with_options(rolout={"x": 1}), 'rolout = {"x": 1} is not an option; did you mean rollout?'),
        (with_options(run__qqq=3), "run.qqq = 3 is not an option; docs/configuration.md lists them"),
        # Names of union members are keys like any other.
        (with_options(run__file=3), "run.file = 3 is not an option"),
        (with_options(data__file=3), "data.file = 3 is not an option"),
        (
            with_options(evaluate__data={"source": "countdown", "x": 1}),
            "evaluate.data.x = 1 is not an option",
        ),
        (
            with_options(evaluate__data=[{"source": "countdown"}, {"source": "countdown", "x": 1}]),
            "evaluate.data[1].x = 1 is not an option",
        ),
        # Of another kind of source.
        *(
            (
                with_options(data={"source": "countdown", option: "x"}),
                f'data.{option} = "x" is not an option of source = "countdown": data has it with '
                'source = "file"',
            )
            for option in ("path", "template", "shuffle", "system_prompt")
        ),
        (
            with_options(data=FILE | {"operators": "+"}),
            'of source = "file": data has it with source = "countdown" or source = "arithmetic"; change',
        ),
        (
            with_options(evaluate__data={"source": "arithmetic", "numbers": 3}),
            'of source = "arithmetic": evaluate.data has it with source = "countdown"; change the source',
        ),
        (with_options(data__pats="x"), 'data.pats = "x" is not an option; docs/configuration.md lists them'),
        # Of another section.
        (
            with_options(run__learning_rate=1.0),
            "run.learning_rate = 1.0 is not an option; did you mean optimizer.learning_rate?",
        ),
    ],
)
def test_an_unknown_key_is_refused(values: dict[str, Any], message: str) -> None:
    assert message in refusal(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({k: v for k, v in MINIMAL.items() if k != "model"}, "section [model] is missing; add it"),
        (with_options(run={"steps": 1}), "run.directory is missing; set it"),
        (with_options(rollout={"prompts_per_step": 1}), "rollout.max_response_tokens is missing; set it"),
        (
            with_options(data={}),
            "data.source is missing; set it to file, function, reasoning_gym, countdown, arithmetic or mix",
        ),
        (with_options(data={"source": "file"}), "data.path is missing; set it"),
        (with_options(evaluate__data={}), "evaluate.data.source is missing"),
    ],
)
def test_a_missing_option_is_named(values: dict[str, Any], message: str) -> None:
    assert message in refusal(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (with_options(run__steps=0), "run.steps = 0: must be greater than 0"),
        (with_options(run__steps="10"), 'run.steps = "10": must be a valid integer'),
        (with_options(run__steps=True), "run.steps = true: must be a valid integer"),
        (with_options(run__seed=-1), "run.seed = -1: must be greater than or equal to 0"),
        (with_options(run__seed=2**31), f"run.seed = {2**31}: must be less than {2**31}"),
        (with_options(model__dtype="float16"), "model.dtype = \"float16\": must be 'bfloat16' or"),
        (with_options(parallel__tensor_parallel=0), "parallel.tensor_parallel = 0: must be greater than 0"),
        (
            with_options(parallel__expert_parallel=2),
            "expert_parallel × expert_tensor_parallel = 2 does not divide the 1 ranks of a stage",
        ),
        (
            with_options(parallel__timeout_s=float("inf")),
            "parallel.timeout_s = Infinity: must be a finite",
        ),
        (
            with_options(data__source="web"),
            "data.source = \"web\" is not one of 'file', 'function', ",
        ),
        (with_options(data__numbers=5), "data.numbers = 5: must be 3 or 4"),
        (with_options(data__largest=1), "data.largest = 1: must be greater than or equal to 2"),
        (
            with_options(rollout__responses_per_prompt=1),
            "rollout.responses_per_prompt = 1: must be greater",
        ),
        (with_options(rollout__temperature=0.0), "rollout.temperature = 0.0: must be greater than 0"),
        (with_options(algorithm__clip_low=1.0), "algorithm.clip_low = 1.0: must be less than 1"),
        (
            with_options(algorithm__flatten_floor=1.5),
            "algorithm.flatten_floor = 1.5: must be less than or",
        ),
        (with_options(optimizer__beta1=float("nan")), "optimizer.beta1 = NaN: must be a finite number"),
        (
            with_options(optimizer__distributed="yes"),
            'optimizer.distributed = "yes": must be true or false',
        ),
        (with_options(checkpoint__every=0), "checkpoint.every = 0: must be greater than 0"),
        (
            with_options(rollout__engine={"servers": 2}, rollout__minimum_engines=3),
            "rollout.minimum_engines = 3 is more than the run's 2 engines",
        ),
        (
            with_options(
                rollout__engine={"kind": "sglang", "servers": 2, "tensor_parallel": 2, "gpus": [0, 1, 2, 2]}
            ),
            "rollout.engine.gpus = [0, 1, 2, 2] does not name 4 GPUs",
        ),
        (
            with_options(rollout__engine={"kind": "sglang", "arguments": ["--port=1"]}),
            "rollout.engine.arguments = ['--port=1']: --port=1 is set by the run",
        ),
        (
            with_options(rollout__dynamic_sampling={"max_rounds": 1}),
            "rollout.dynamic_sampling.max_rounds = 1: must be greater than or equal to 2",
        ),
        (with_options(evaluate__k=[1, 0]), "evaluate.k[1] = 0: must be greater than 0"),
        (
            with_options(rollout__engine={"kind": "sglang", "urls": "http://a:1"}),
            """rollout.engine.urls = "http://a:1": must be a list; write urls = ["http://a:1"], or """
            """--set 'rollout.engine.urls=["http://a:1"]'""",
        ),
        (
            with_options(evaluate__k=4),
            "evaluate.k = 4: must be a list; write k = [4], or --set 'evaluate.k=[4]'",
        ),
        (
            with_options(observe={"wandb": "offline", "wandb_project": 7}),
            """observe.wandb_project = 7: must be text; write wandb_project = "7", or """
            """--set 'observe.wandb_project="7"'""",
        ),
        (
            with_options(evaluate=True),
            "evaluate = true: must be a table; write [evaluate], and its options below",
        ),
        (
            with_options(data={"source": "countdown", "label": "a b"}),
            'data.label = "a b": must be of letters, digits',
        ),
        (with_options(model__path=""), 'model.path = "": must name a file or folder'),
        (with_options(run__directory="a\0b"), 'run.directory = "a\\u0000b": must name a file or folder'),
        *(
            (
                with_options(**{f"{table}__{option}": 1e300}),
                f"{table}.{option} = 1e+300: must be less than or",
            )
            for table, option in (
                ("parallel", "timeout_s"),
                ("rollout", "request_timeout_s"),
                ("reward", "time_limit_s"),
            )
        ),
        (with_options(model__path=3), 'model.path = 3: must be text; write path = "3", or --set'),
        (with_options(observe__wandb="on"), "observe.wandb = \"on\": must be 'off', 'offline' or 'online'"),
        (
            with_options(algorithm={"importance_correction": "masked", "importance_cap": 1.0}),
            "importance_cap",
        ),
        (with_options(algorithm__clip_low=1.0), "clip_low"),
        (with_options(optimizer__beta1=1.0), "beta1"),
        (with_options(optimizer__beta2=1.0), "beta2"),
        (with_options(evaluate={"settings": [{"top_p": 0.0}]}), "top_p"),
        (with_options(reward__unknown_limit=1.1), "unknown_limit"),
    ],
)
def test_a_value_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    assert message in refusal(values)


# Refusals of what would have no effect


def test_a_profile_is_of_ranks_and_steps_that_there_are() -> None:
    said = refusal(with_options(observe={"profile_steps": [1], "profile_ranks": [0, 1]}))
    assert "observe.profile_ranks = [0, 1] names a rank beyond those of [parallel], 0 to 0; lower it" in said
    said = refusal(with_options(observe={"profile_steps": [1, 10**6]}))
    assert "observe.profile_steps = [1, 1000000] has a step beyond run.steps" in said
    validate(with_options(observe={"profile_steps": [1]}), source="test")


@pytest.mark.parametrize(
    ("values", "option", "reason"),
    [
        (
            with_options(parallel__sequence_parallel=True),
            "parallel.sequence_parallel = True",
            "tensor_parallel is 1",
        ),
        (
            with_options(parallel__virtual_pipeline_parallel=2),
            "parallel.virtual_pipeline_parallel = 2",
            "pipeline_parallel is 1",
        ),
        (
            with_options(parallel={"pipeline_parallel": 2, "virtual_pipeline_parallel": 1}),
            "parallel.virtual_pipeline_parallel = 1",
            "one chunk a stage is the plain pipeline",
        ),
        (
            with_options(data=FILE | {"template": "plain", "system_prompt": "s"}),
            "data.system_prompt = 's'",
            'template is "plain"',
        ),
        *(
            (
                with_options(rollout__engine={"kind": kind, "urls": ["http://127.0.0.1:1"], option: value}),
                f"rollout.engine.{option} = {value!r}",
                "urls name running servers",
            )
            for kind, option, value in [
                ("embedded", "servers", 2),
                ("embedded", "device", "cpu"),
                ("embedded", "threads", 1),
                ("sglang", "servers", 1),
                ("sglang", "tensor_parallel", 2),
            ]
        ),
        (
            with_options(
                rollout__engine={"kind": "sglang", "urls": ["http://a:1"], "router": "http://a:2"},
                rollout__prompts_per_request=4,
            ),
            "rollout.prompts_per_request = 4",
            "a router takes a request a response",
        ),
        *(
            (
                with_options(algorithm={"method": method, "divergence_coefficient": 0.0, option: value}),
                f"algorithm.{option} = {value!r}",
                "divergence_coefficient is 0",
            )
            for method, option, value in (
                ("rapo", "flatten_floor", 0.5),
                ("rapo", "divergence", "forward_printed"),
                ("rapo", "flatten_fact", "progress"),
                ("grpo", "divergence", "k2"),
            )
        ),
        (
            with_options(algorithm={"flatten_floor": 1.0, "flatten_fact": "progress"}),
            "algorithm.flatten_fact = 'progress'",
            "flatten_floor = 1 never flattens",
        ),
        (
            with_options(algorithm={"importance_cap": 3.0}),
            "algorithm.importance_cap = 3.0",
            'importance_correction is "off"',
        ),
        (
            with_options(optimizer={"min_learning_rate": 1e-8}),
            "optimizer.min_learning_rate = 1e-08",
            'decay is "constant"',
        ),
        (
            with_options(algorithm={"method": "grpo", "old_log_probs": "engine", "importance_cap": 3.0}),
            "algorithm.importance_cap = 3.0",
            'old_log_probs is "engine": the ratio is over the policy that sampled',
        ),
        (
            with_options(rollout__max_staleness=1, guards={"mismatch": "stop"}),
            "guards.mismatch = 'stop'",
            "rollout.max_staleness = 1: samples are of older weights",
        ),
        (
            with_options(observe={"profile_ranks": [1]}),
            "observe.profile_ranks = [1]",
            "profile_steps = [] profiles nothing",
        ),
        (with_options(observe={"wandb_project": "p"}), "observe.wandb_project = 'p'", 'wandb is "off"'),
    ],
)
def test_an_option_without_effect_is_refused(values: dict[str, Any], option: str, reason: str) -> None:
    assert f"{option} would have no effect: {reason}; remove it" in refusal(values)


# Refusals of combinations


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            with_options(
                algorithm={"share_prompts": True}, parallel={"context_parallel": 2, "tensor_parallel": 2}
            ),
            "algorithm.share_prompts = true does not go with parallel.context_parallel = 2, which cuts each "
            "sequence into chunks of one length: sequences that share some of their tokens cannot be; remove",
        ),
        (
            with_options(data={"source": "file", "path": "a.csv"}),
            "data.path = 'a.csv' is neither .jsonl nor .parquet; convert it",
        ),
        (
            with_options(data=FILE | {"template": "Chat"}),
            'data.template = "Chat" is neither "chat" nor "plain", nor a .jinja file, nor Jinja text',
        ),
        (
            with_options(data=FILE | {"template_options": {"messages": []}}),
            "data.template_options has 'messages', which every template is given; remove it",
        ),
        (
            with_options(
                data=FILE | {"few_shot": [{"question": "q", "answer": "a"}], "few_shot_file": "a.jsonl"}
            ),
            "data.few_shot_file = 'a.jsonl' stands beside few_shot; keep one of them",
        ),
        (
            with_options(data=FILE | {"few_shot_file": "a.json"}),
            "data.few_shot_file = 'a.json' is no .jsonl file; convert it",
        ),
        (
            with_options(data=FILE | {"few_shot": [{"question": "q"}]}),
            "data.few_shot[0].answer is missing; set it",
        ),
        (
            with_options(data={"source": "function", "problems": "my_data.py"}),
            'data.problems = "my_data.py" names no function; write it like "my_data:problems"',
        ),
        (
            with_options(data=FILE | {"template_text": "no place"}),
            "data.template_text = 'no place' lacks {prompt}; add it",
        ),
        (
            with_options(data=FILE | {"template_text": "{prompt} \\boxed{x}"}),
            "has 'x' in braces, and more than {prompt} is not understood; write {prompt} for the problem",
        ),
        *(
            (with_options(data=FILE | {"template_text": text}), "write {prompt} for the problem, and {{ }}")
            for text in (
                "{",
                "{prompt",
                "{}",
                "{0}",
                "{prompt[0]}",
                "{prompt[x]}",
                "{prompt.x}",
                "{prompt!r}",
            )
        ),
        (
            with_options(data__operators="+%"),
            "data.operators = '+%' must be a choice of the characters",
        ),
        (
            with_options(data={"source": "arithmetic", "operators": "/"}),
            "data.operators = '/' must be a choice of the characters '+-*'",
        ),
        (
            with_options(rollout__engine={"kind": "sglang", "urls": ["localhost:30000"]}),
            "'localhost:30000' is not an address; write http://HOST:PORT",
        ),
        (
            with_options(rollout__engine={"kind": "sglang", "urls": ["http://a:port"]}),
            "'http://a:port' is not an address: Port could not be cast to integer value as 'port'",
        ),
        *(
            (
                with_options(rollout__engine={"kind": "sglang", "urls": urls}),
                f"{urls[0]!r} and {urls[1]!r} are the same server",
            )
            for urls in (
                ["http://a:30000", "http://a:30000"],
                ["http://a:30000", "http://A:30000/"],
                ["http://a", "http://a:80"],
                ["http://localhost:30000", "http://127.0.0.1:30000"],
            )
        ),
        (
            with_options(rollout__engine={"router": "http://a:30000"}),
            "rollout.engine.router = 'http://a:30000' needs the engines' own addresses",
        ),
        (
            with_options(rollout__engine={"kind": "sglang", "urls": ["http://a:1"], "router": "a:2"}),
            "rollout.engine.router = 'a:2': 'a:2' is not an address",
        ),
        (
            with_options(
                rollout__engine={
                    "kind": "sglang",
                    "urls": ["http://a:1", "http://a:2"],
                    "router": "http://a:2/",
                }
            ),
            "rollout.engine.router = 'http://a:2/' is the engine 'http://a:2' of urls",
        ),
        (
            with_options(optimizer={"decay": "linear", "learning_rate": 1e-6, "min_learning_rate": 1e-6}),
            "optimizer.min_learning_rate = 1e-06 must be below learning_rate = 1e-06; lower it",
        ),
        (
            with_options(optimizer={"overlap_communication": True, "distributed": False}),
            "optimizer.overlap_communication = true needs distributed = true",
        ),
        (with_options(evaluate={"k": [1, 32]}), "evaluate.k = [1, 32] needs values from 1 to samples = 16"),
        (with_options(evaluate={"k": []}), "evaluate.k = [] needs values from 1 to samples = 16"),
        (with_options(observe={"wandb": "online"}), 'observe.wandb = "online" needs wandb_project; set it'),
        (
            with_options(algorithm={"minibatch_prompts": 3}),
            "algorithm.minibatch_prompts = 3 does not divide rollout.prompts_per_step = 8; choose a divisor",
        ),
        (
            with_options(parallel={"data_parallel": 9}),
            "rollout.prompts_per_step = 8 leaves some of parallel.data_parallel = 9 replicas without",
        ),
        (
            with_options(evaluate={"every": 4}),
            "evaluate.every = 4 is beyond run.steps = 3; lower or remove it",
        ),
        (
            with_options(checkpoint={"every": 4}),
            "checkpoint.every = 4 is beyond run.steps = 3; lower or remove it",
        ),
        (
            with_options(checkpoint={"every": 2, "keep_every": 3}),
            "checkpoint.keep_every = 3 is no multiple of every = 2: no such step would be saved",
        ),
        (
            with_options(guards={"mismatch": "roll_back"}),
            'guards with the action "roll_back" need checkpoint.every',
        ),
        (
            with_options(guards={"mismatch": "off", "mismatch_limit": 0.2}),
            'guards.mismatch_limit = 0.2 would have no effect: mismatch = "off"; remove it',
        ),
        (
            with_options(guards={"unknown_rewards": "off"}, reward={"unknown_limit": 0.2}),
            'reward.unknown_limit = 0.2 would have no effect: guards.unknown_rewards = "off"',
        ),
        (
            with_options(run__relaunches=2, checkpoint__resume=False),
            "run.relaunches = 2 needs checkpoint.resume = true; set it",
        ),
        (
            with_options(data={"source": "countdown", "problems": 1_000_001}),
            "data.problems = 1000001: must be less than or equal to 1000000",
        ),
        (
            with_options(reward={"verifier": "math"}),
            'reward.verifier = "math" cannot check data.source = "countdown"; remove it',
        ),
        (
            with_options(data={"source": "arithmetic"}, reward={"verifier": "countdown"}),
            'reward.verifier = "countdown" cannot check data.source = "arithmetic"; remove it',
        ),
        (
            with_options(data=FILE, evaluate={}),
            "evaluate.data is missing: training prompts from a file leave none held out; add it",
        ),
        (
            with_options(evaluate={"data": [FILE, {**FILE, "path": "b/a.jsonl"}]}),
            'evaluate.data names "a" 2 times; leave one, or give them names',
        ),
        (with_options(evaluate={"data": []}), "evaluate.data = [] has no problems"),
        (
            with_options(evaluate={"best": "pass@2"}),
            "evaluate.best = 'pass@2' is not measured; choose one of pass@1, pass@4, pass@16, maj@1",
        ),
        (
            with_options(evaluate={"settings": [{"top_p": 0.9}, {"top_p": 0.9}]}),
            'evaluate.settings names "t1-p0.9" 2 times',
        ),
        (
            with_options(evaluate={"settings": [{"max_response_tokens": 65}]}),
            "max_response_tokens = 65 exceeds rollout.max_response_tokens = 64; lower it",
        ),
        (
            with_options(algorithm={"method": "dapo", "overlong_buffer_tokens": 65}),
            "algorithm.overlong_buffer_tokens = 65 is longer than rollout.max_response_tokens = 64",
        ),
    ],
)
def test_an_impossible_combination_is_refused(values: dict[str, Any], message: str) -> None:
    assert message in refusal(values)


def test_all_problems_are_told_at_once() -> None:
    message = refusal(with_options(run__steps=0, model__dtype="int8", data__numbers=7))
    assert all(key in message for key in ("run.steps", "model.dtype", "data.numbers"))


# What is derived, and what is written out


@pytest.mark.parametrize(
    ("multiple", "parallel"),
    [
        (1, {}),
        (1, {"tensor_parallel": 3}),
        (4, {"context_parallel": 2}),  # two zig-zag halves a rank
        (3, {"tensor_parallel": 3, "sequence_parallel": True, "pipeline_parallel": 2}),
        (12, {"tensor_parallel": 3, "sequence_parallel": True, "context_parallel": 2}),
    ],
)
def test_sequences_are_padded_for_the_layout(multiple: int, parallel: dict[str, Any]) -> None:
    assert validate(with_options(parallel=parallel), source="run.toml").sequence_multiple == multiple


def test_updates_and_verifier_follow_from_the_options() -> None:
    config = validate(with_options(algorithm={"minibatch_prompts": 2}), source="run.toml")
    assert (config.minibatch_prompts, config.updates_per_step) == (2, 4)
    for source, verifier in (("countdown", "countdown"), ("arithmetic", "integer")):
        config = validate(with_options(data={"source": source}), source="run.toml")
        assert str(config.verifier_of(config.data)) == verifier


WRITTEN = [
    MINIMAL,
    with_options(evaluate={}, parallel={"tensor_parallel": 2, "sequence_parallel": True}),
    with_options(
        rollout__engine={"kind": "sglang", "urls": ["http://127.0.0.1:1"]}, algorithm={"method": "grpo"}
    ),
    with_options(algorithm={"method": "dapo"}, optimizer={"decay": "cosine", "min_learning_rate": 1e-9}),
    with_options(
        data={"source": "file", "path": "a.jsonl", "template_text": 'täg "{prompt}"\n\t\\boxed{{}}\x7f'},
        evaluate={"data": {"source": "file", "path": "b.parquet", "template": "plain"}},
        observe={"wandb": "offline", "wandb_project": "p"},
    ),
]


@pytest.mark.parametrize("values", WRITTEN)
def test_the_resolved_configuration_reads_back_as_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    config = validate(values, source="run.toml")
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load_config([tmp_path / "resolved.toml"]) == config


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_toml_writer(text: str) -> None:
    config = validate(with_options(observe={"wandb": "offline", "wandb_project": text}), source="run.toml")
    assert tomllib.loads(to_toml(config))["observe"]["wandb_project"] == text


def test_a_configuration_does_not_change_after_validation() -> None:
    config = validate(MINIMAL, source="run.toml")
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 4  # type: ignore[misc]


# The documentation


def test_the_documentation_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == document.render(), (
        "python -m megatron_rapo.config.document > docs/configuration.md"
    )


def bounds_of(annotation: Any) -> Iterator[list[str]]:
    """The bounds that each part of a type has, such as `["gt", "gt"]`."""
    metadata = getattr(annotation, "__metadata__", ())
    fields = [item for item in metadata if isinstance(item, FieldInfo)]
    found = [*metadata, *(item for field in fields for item in field.metadata)]
    yield [name for item in found for name in ("gt", "ge", "lt", "le") if hasattr(item, name)]
    for part in get_args(annotation):
        yield from bounds_of(part)


@pytest.mark.parametrize(
    ("data", "chosen", "verifier"),
    [
        (FILE, None, "math"),
        (FILE, "integer", "integer"),
        ({"source": "arithmetic"}, "math", "math"),
        ({"source": "countdown"}, "countdown", "countdown"),
    ],
)
def test_a_verifier_may_be_chosen(data: dict[str, Any], chosen: str | None, verifier: str) -> None:
    """For training and for its evaluation; countdown's answers go with its own alone."""
    sets = [{**FILE, "path": "b.jsonl"}, {"source": "countdown", "numbers": 3}]
    config = validate(
        with_options(data=data, reward={"verifier": chosen}, evaluate={"data": sets}), source="t"
    )
    assert str(config.verifier_of(config.data)) == verifier
    found = [str(config.verifier_of(one)) for one in config.evaluation_data]
    assert found == ["math" if verifier == "countdown" else verifier, "countdown"]


def test_what_is_done_once_at_the_last_step_is_accepted() -> None:
    config = validate(with_options(checkpoint={"every": 3}, evaluate={"every": 3}), source="t")
    assert (config.checkpoint.every, config.evaluate and config.evaluate.every) == (3, 3)


def test_a_problem_between_sections_is_told_by_itself() -> None:
    told = refusal(with_options(checkpoint={"every": 4}))
    assert told.startswith("configuration run.toml is not valid:\n  checkpoint.every = 4 is beyond")


def test_options_are_written_below_their_table() -> None:
    text = to_toml(validate(with_options(evaluate={}), source="t"))
    assert text.startswith("[run]\n")
    assert "\n\n[rollout]\n" in text and "\nprompts_per_step = 8\n" in text and "\n\n[evaluate]\n" in text


def test_the_documentation_is_printed_by_its_module_alone(capsys: pytest.CaptureFixture[str]) -> None:
    path = document.__file__
    runpy.run_path(path, run_name="imported")
    assert capsys.readouterr().out == ""
    runpy.run_path(path, run_name="__main__")
    assert capsys.readouterr().out == document.render()


def all_models(model: type[BaseModel] = BaseModel) -> Iterator[type[BaseModel]]:
    for below in model.__subclasses__():
        if below.__module__.startswith("megatron_rapo."):
            yield below
        yield from all_models(below)


def test_no_option_stacks_two_bounds_of_one_side() -> None:
    """Of `PositiveFloat` with `gt = 1` pydantic takes the last alone, whichever that is: 0."""
    models = set(all_models())
    assert {RunConfig, RAPO.Options} <= models
    for model in models:
        for name, field in model.model_fields.items():
            outer = [
                bound for item in field.metadata for bound in ("gt", "ge", "lt", "le") if hasattr(item, bound)
            ]
            for bounds in (outer, *bounds_of(field.annotation)):
                for side in ("gt", "ge"), ("lt", "le"):
                    assert sum(bound in side for bound in bounds) <= 1, f"{model.__name__}.{name}: {bounds}"


def test_every_option_is_documented() -> None:
    page = document.render()
    missing = [
        name
        for model in [*document.sections(), Options]
        for name, field in model.model_fields.items()
        if f"| `{name}` |" not in page or (name not in ("source", "method") and not field.description)
    ]
    assert not missing


def test_the_example_in_the_documentation_is_valid(tmp_path: Path) -> None:
    example = document.render().split("```toml\n")[1].split("```")[0]
    (tmp_path / "run.toml").write_text(example)
    assert isinstance(load_config([tmp_path / "run.toml"]), RunConfig)
