"""What `megatron-rapo evaluate` makes of its command line, and by which names its errors call options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluate.command import Request, as_typed, run
from megatron_rapo.evaluate.interval import Estimate
from megatron_rapo.evaluate.results import Result, table
from megatron_rapo.evaluate.statistics import Lengths, Statistics
from megatron_rapo.evaluate.subject import recorded_configuration
from megatron_rapo.reward.outcome import Outcome

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
        # With a configuration only what was said beside it has another name.
        (["run.toml"], {"data": ["x.jsonl"]}, "data.path, evaluate.data.path", "data.path, --data"),
        (["run.toml"], {}, "evaluate.data.path, model.path", "evaluate.data.path, model.path"),
        (["run.toml"], {"samples": 3}, "evaluate.samples = 3", "--samples = 3"),
    ],
)
def test_errors_name_options_as_they_were_typed(
    configs: list[str], said: dict[str, object], message: str, expected: str
) -> None:
    assert as_typed(message, Request(configs=[Path(c) for c in configs], **said)) == expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"data": ["nowhere.jsonl"]}, r"nowhere\.jsonl does not exist; correct --data$"),
        ({"data": ["countdown"], "samples": 0}, r"command line is not valid:\n  --samples = 0: must be"),
        ({"data": ['{source="countdown", numbers=9}']}, r"not valid:\n  numbers of --data's table = 9.*4$"),
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
        unextracted=0.5,
        truncated=0.0,
        lengths=Lengths(1.0, 1.0, 1.0, 1),
    )
    assert ("no sample is correct, and in 50% no answer" in table([Result("a", "t1", statistics)])) is told
