"""What `megatron-rapo evaluate` makes of its command line, and by which names its errors call options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation import command, standalone
from megatron_rapo.evaluation.command import Request, _as_typed, run
from megatron_rapo.evaluation.interval import Estimate
from megatron_rapo.evaluation.results import Result, table
from megatron_rapo.evaluation.statistics import Lengths, Statistics
from megatron_rapo.evaluation.subject import recorded_configuration

MODEL = Path(__file__).parents[2] / "examples/models/tiny-countdown"
ALONE = {"model": MODEL, "data": ["x.jsonl"]}


@pytest.mark.parametrize(
    ("configs", "said", "message", "expected"),
    [
        ([], ALONE, "correct evaluate.data.path", "correct --data"),
        ([], ALONE, "correct evaluate.data[1].path", "correct --data"),
        ([], ALONE, "set data.prompt_field to one", "set prompt_field of --data's table to one"),
        ([], ALONE, 'set evaluate.data.template = "plain" (', "set --template plain ("),
        ([], ALONE, "file /my/data.jsonl and data.jsonl", "file /my/data.jsonl and data.jsonl"),
        ([], ALONE, "rollout.max_response_tokens = 5", "--max-response-tokens = 5"),
        ([], ALONE, "model.path has", "--model has"),
        ([], ALONE, "data.shuffle is no option", "shuffle of --data's table is no option"),
        ([], {**ALONE, "data": ["{foo = 1}"]}, "data.foo = 1", "foo of --data's table = 1"),
        ([], {**ALONE, "settings": ["data.shuffle=3"]}, "data.shuffle = 3", "data.shuffle = 3"),
        ([], {**ALONE, "settings": ["model.path=/m"]}, "model.path = /m", "model.path = /m"),
        (
            [],
            ALONE,
            "not valid:\n  data.shuffle = 3: bad\n  evaluate.data[0].shuffle = 3: bad",
            "not valid:\n  shuffle of --data's table = 3: bad",
        ),
        # With a configuration only what was said beside it has another name.
        (["run.toml"], {"data": ["x.jsonl"]}, "data.path, evaluate.data.path", "data.path, --data"),
        (["run.toml"], {}, "evaluate.data.path, model.path", "evaluate.data.path, model.path"),
        (["run.toml"], {"samples": 3}, "evaluate.samples = 3", "--samples = 3"),
    ],
)
def test_errors_name_options_as_they_were_typed(
    configs: list[str], said: dict[str, object], message: str, expected: str
) -> None:
    assert _as_typed(message, Request(configs=[Path(c) for c in configs], **said)) == expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"data": ["nowhere.jsonl"]}, r"nowhere\.jsonl does not exist; correct --data$"),
        ({"data": ["countdown"], "samples": 0}, r"command line is not valid:\n  --samples = 0: must be"),
        ({"data": ['{source="countdown", numbers=9}']}, r"not valid:\n  numbers of --data's table = 9.*4$"),
        ({"data": ['{source="countdown", foo=1}']}, r"not valid:\n  foo of --data's table = 1 is not an opt"),
        (
            {"data": ['{source="reasoning_gym", datasets=["x"]}']},
            r"datasets of --data's table = \[\"x\"\] is not an option; did you mean dataset of --data's tab",
        ),
        (
            {"data": ['{source="file", path="x", prompt_field=3}']},
            r"not valid:\n  prompt_field of --data's table = 3: must be text; write prompt_field = \"3\"$",
        ),
        ({"data": ["countdown"], "settings": ["evaluate.samples=0"]}, r"\n  evaluate\.samples = 0: must be"),
        # The model has 256 positions; no engine is started to find that out.
        ({"data": ["countdown"]}, r"--max-response-tokens = 2048 and .* 256 positions; give .* at most 241$"),
    ],
)
def test_bad_command_lines_are_refused_by_the_names_typed(
    tmp_path: Path, said: dict[str, object], message: str
) -> None:
    with pytest.raises(RapoError, match=message):
        run(Request(model=MODEL, out=tmp_path / "out", **said))


def test_a_base_model_without_a_chat_template_is_told_of_the_flag(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "1+1", "answer": "2"}) + "\n")
    with pytest.raises(RapoError, match=r"no chat template; set --template plain"):
        run(Request(model=MODEL, data=[str(data)], out=tmp_path / "out"))


def test_weights_that_are_not_those_of_the_config_are_refused_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "open_own_engines", lambda *_: pytest.fail("an engine was started"))
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    with pytest.raises(RapoError, match=r"model.embed_tokens.weight in .* has shape .*is config\.json"):
        run(Request(model=model, data=["countdown"], max_response_tokens=32, out=tmp_path / "out"))


def test_a_generated_task_is_the_one_that_the_run_trained_on(tmp_path: Path) -> None:
    """Three numbers, not the default of four: the prompt of four numbers is longer by a number."""
    model = tmp_path / "run/model"
    model.parent.mkdir()
    model.symlink_to(MODEL)
    config = tmp_path / "run/config.toml"
    config.write_text(
        f"""
[run]
directory = "{tmp_path / "run"}"
steps = 4
[model]
path = "{MODEL}"
[data]
source = "countdown"
numbers = 3
largest = 9
[rollout]
prompts_per_step = 4
max_prompt_tokens = 32
max_response_tokens = 32
"""
    )
    assert recorded_configuration(model) == config
    for request in (
        Request(model=model, data=["countdown"], out=tmp_path / "a"),
        Request(configs=[config], data=["countdown"], settings=["rollout.max_response_tokens=300"]),
    ):
        # The largest number has one digit: the longest prompt tells that the run's options were taken.
        with pytest.raises(RapoError, match=r"longest prompt's 9 tokens"):
            run(request)
    with pytest.raises(RapoError, match=r"longest prompt's 15 tokens"):
        run(Request(model=MODEL, data=["countdown"], out=tmp_path / "b"))


@pytest.mark.parametrize(("correct", "told"), [(0.0, True), (0.01, False)])
def test_a_table_of_zeros_says_what_else_it_may_mean(correct: float, told: bool) -> None:
    estimate = Estimate(correct, 0.0, 1.0)
    statistics = Statistics(
        problems=3,
        samples=(2, 2),
        drawn=6,
        mean=estimate,
        pass_at_k={1: estimate},
        majority_at_k={},
        outcomes={Outcome.CORRECT: correct, Outcome.WRONG: 1 - correct},
        reward=None,
        graded=False,
        unextracted=0.5,
        truncated=0.0,
        lengths=Lengths(1.0, 1.0, 1.0, 1),
    )
    assert ("no sample is correct, and in 50% no answer" in table([Result("a", "t1", statistics)])) is told


RUN = """
[run]
directory = "{directory}"
steps = 4
[model]
path = "{model}"
[data]
source = "arithmetic"
terms = 2
[rollout]
prompts_per_step = 4
max_prompt_tokens = 32
max_response_tokens = 32
{evaluate}
"""


@pytest.fixture
def asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[RunConfig, Path, int | None]]:
    """What is evaluated, where, and the correct samples at which a problem is done; nothing is."""

    class Asked(Exception):
        pass

    def evaluate(config: RunConfig, record: object, out: Path, *, adaptive: int | None) -> None:
        raise Asked(config, out, adaptive)

    monkeypatch.setattr(command, "evaluate", evaluate)
    monkeypatch.setattr(command, "open_model", lambda model, out: (model, None))
    monkeypatch.chdir(tmp_path)

    def ask(evaluate: str | None = "[evaluate]", **said: Any) -> tuple[RunConfig, Path, int | None]:
        if evaluate is not None:
            file = tmp_path / "run.toml"
            file.write_text(RUN.format(directory=tmp_path / "run", model=MODEL, evaluate=evaluate))
            said = {"configs": [file], **said}
        with pytest.raises(Asked) as raised:
            run(Request(**said))
        found: tuple[RunConfig, Path, int | None] = raised.value.args
        return found

    return ask


def test_what_is_said_beside_a_configuration_changes_that_alone(asked: Any, tmp_path: Path) -> None:
    plain, out, adaptive = asked()
    assert (plain.model.path, plain.evaluate.samples, plain.evaluate.k) == (MODEL, 16, [1, 4, 16])
    assert (out, adaptive) == (tmp_path / "run/evaluations/tiny-countdown", None)
    assert plain.run.directory == out
    assert plain.data.source == "arithmetic" and plain.rollout.max_response_tokens == 32
    said, out, adaptive = asked(
        model=Path("other"),
        data=["countdown"],
        samples=12,
        max_response_tokens=9,
        stop_after_correct=12,
        out=tmp_path / "x",
        settings=["run.seed=3"],
    )
    assert (said.model.path, said.rollout.max_response_tokens, said.run.seed) == (Path("other"), 9, 3)
    assert [one.source for one in said.evaluate.data] == ["countdown"]
    assert said.data == plain.data
    assert (said.evaluate.samples, said.evaluate.k) == (12, [1, 2, 4, 8, 12])
    assert (out, adaptive) == (tmp_path / "x", 12)
    assert asked(samples=12, k=[3])[0].evaluate.k == [3]
    assert asked(evaluate="[evaluate]\nsamples = 32", k=[32])[0].evaluate.samples == 32


def test_a_generated_task_has_the_runs_options_in_its_evaluation(asked: Any) -> None:
    found, *_ = asked(data=["arithmetic", "countdown"])
    assert found.evaluate.data[0] == found.data and found.data.terms == 2
    assert found.evaluate.data[1].numbers == 4


def test_without_a_configuration_the_rest_has_defaults(asked: Any, tmp_path: Path) -> None:
    found, out, adaptive = asked(None, model=MODEL, data=["arithmetic", "x.jsonl"], template="plain")
    assert (out, adaptive) == (Path("evaluations/tiny-countdown"), None)
    assert (found.rollout.max_prompt_tokens, found.rollout.max_response_tokens) == (1024, 2048)
    assert (found.evaluate.samples, found.evaluate.k) == (16, [1, 4, 16])
    assert (found.data.source, found.evaluate.data[1].template) == ("arithmetic", "plain")
    found, _, adaptive = asked(
        None, model=MODEL, data=["{source = 'countdown', numbers = 3}"], stop_after_correct=2
    )
    assert (found.evaluate.data[0].numbers, found.data.numbers, adaptive) == (3, 3, 2)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"model": MODEL}, "evaluate needs a configuration, or --model and --data; name them"),
        ({"data": ["countdown"]}, "evaluate needs a configuration, or --model and --data; name them"),
        ({"configs": True}, "the configuration has no .evaluate.; add it, or say --data and --samples"),
        (
            {"model": MODEL, "data": ["countdown"], "stop_after_correct": 17},
            "--stop-after-correct 17 has no effect beside 16 samples a problem",
        ),
        ({"configs": True, "samples": 0}, r"^configuration run.toml, --set is not valid:\n  --samples = 0"),
    ],
)
def test_what_says_too_little_or_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if said.pop("configs", False):
        Path("run.toml").write_text(RUN.format(directory="run", model=MODEL, evaluate=""))
        said = {**said, "configs": [Path("run.toml")]}
    with pytest.raises(RapoError, match=message):
        run(Request(**said))
