"""The data sets of an evaluation, what is refused of them, and what is still to be sampled."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_rapo.config import Evaluate, RunConfig, validate
from megatron_rapo.data.load import load_training_prompts
from megatron_rapo.data.order import PromptOrder
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.command import Request, run
from megatron_rapo.evaluation.evaluator import Evaluator
from megatron_rapo.evaluation.held_out import load_held_out, setting_records
from megatron_rapo.evaluation.plan import plan
from tests.models import make_tokenizer

TOKENIZER = make_tokenizer()
ROW = {"question": "1+1", "answer": "2"}


def configuration(tmp_path: Path, rows: list[dict[str, Any]], **evaluate: Any) -> RunConfig:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arithmetic = evaluate.pop("arithmetic", {})
    data = {"source": "file", "path": str(path), "template": "plain", "template_text": "{prompt}"}
    return validate(
        {
            "run": {"directory": str(tmp_path), "steps": 1, "seed": evaluate.pop("seed", 1)},
            "model": {"path": "model"},
            "data": {"source": "countdown", "problems": 100},
            "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
            "evaluate": {
                "data": [{**data, **evaluate.pop("file", {})}, {"source": "arithmetic", **arithmetic}],
                **evaluate,
            },
        },
        "test",
    )


def test_every_data_set_has_its_verifier_and_fingerprints(tmp_path: Path) -> None:
    rows = [{"question": "1+1", "answer": "2", "id": "x"}, {"question": "2+2", "answer": "4"}]
    first, second = load_held_out(configuration(tmp_path, rows), TOKENIZER)
    assert [(one.name, one.verifier) for one in (first, second)] == [
        ("set", "math"),
        ("arithmetic", "integer"),
    ]
    assert [problem.id for problem in first.problems] == ["x", "1"]
    assert len(second.problems) == 64
    other, _ = load_held_out(configuration(tmp_path, [rows[0], {**rows[1], "answer": "5"}]), TOKENIZER)
    assert other.record.fingerprint != first.record.fingerprint
    assert other.prompts_fingerprint == first.prompts_fingerprint
    told, _ = load_held_out(configuration(tmp_path, rows, file={"template_text": "{prompt}="}), TOKENIZER)
    assert told.record == first.record
    assert told.prompts_fingerprint != first.prompts_fingerprint


def test_held_out_problems_are_the_same_for_every_run_seed(tmp_path: Path) -> None:
    """Two runs of one configuration, and their base, are compared on the same generated problems."""
    first, second = (
        load_held_out(configuration(tmp_path, [ROW], seed=seed), TOKENIZER)[1].record for seed in (1, 2)
    )
    assert first == second
    other = configuration(tmp_path, [ROW], arithmetic={"seed": 5})
    assert load_held_out(other, TOKENIZER)[1].record.fingerprint != first.fingerprint


def test_training_problems_are_the_same_for_every_run_seed_in_another_order(tmp_path: Path) -> None:
    sets, orders = [], []
    for seed in (1, 2):
        config = configuration(tmp_path, [ROW], seed=seed)
        [prompts] = load_training_prompts(config, TOKENIZER).sets
        sets.append([prompt.question for prompt in prompts])
        orders.append([p.question for p in PromptOrder(prompts, seed=seed, shuffle=True).draw(50)])
    assert sets[0] == sets[1]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "1+1", "answer": "2", "id": 7}, {"question": "2+2", "answer": "4", "id": "7"}],
            r"has the id '7' 2 times \(rows 0, 1\).*set evaluate\.data\[0\]\.id_field",
        ),
        (
            [{"question": "1+1"}],
            r"has no field 'answer'; set evaluate\.data\[0\]\.answer_field to one of its fields: question",
        ),
        ([{"answer": "2"}], r"has no field 'question'"),
        ([{"question": "1+1", "answer": " "}], r"no prompt is usable"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RapoError, match=message):
        load_held_out(configuration(tmp_path, rows), TOKENIZER)


def test_settings_have_the_runs_defaults(tmp_path: Path) -> None:
    [plain] = setting_records(configuration(tmp_path, []))
    assert (plain.name, plain.temperature, plain.top_p, plain.top_k, plain.max_response_tokens) == (
        "t1",
        1.0,
        1.0,
        -1,
        8,
    )
    settings = [{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_response_tokens": 4}]
    [told] = setting_records(configuration(tmp_path, [], settings=settings))
    assert (told.name, told.top_k, told.max_response_tokens) == ("t0.6-p0.95-k20-l4", 20, 4)


@pytest.mark.parametrize("samples", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_the_plan_is_every_missing_sample_once(samples: int, rows: int) -> None:
    prompts = [Prompt(index, "", (1,), "") for index in range(5)]
    present = {("1", 0), ("1", 3), ("4", 64)} | {("2", number) for number in range(samples)}
    batches = list(plan(prompts, samples, present, rows=rows))
    planned = [
        (prompt.id, number)
        for batch in batches
        for prompt in batch.prompts
        for number in range(batch.first, batch.first + batch.count)
    ]
    everything = {(prompt.id, number) for prompt in prompts for number in range(samples)}
    assert sorted(planned) == sorted(everything - present)
    assert all(len(batch.prompts) * batch.count <= rows for batch in batches)


def test_closed_problems_are_not_planned() -> None:
    prompts = [Prompt(index, "", (1,), "") for index in range(2)]
    batches = plan(prompts, 200, frozenset(), rows=64, is_open=lambda problem: problem == "1")
    assert {prompt.id for batch in batches for prompt in batch.prompts} == {"1"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "evaluate needs a configuration, or --model and --data"),
        (Request(model=Path("m")), "evaluate needs a configuration, or --model and --data"),
        (Request(configs=[Path("c")], template="plain"), "--template plain is that of the files of --data"),
        (Request(model=Path("m"), data=["{source="]), r"--data \{source= is no TOML table"),
        (Request(model=Path("m"), data=["countdown"], samples=4, k=[8]), r"--k = \[8\] needs values"),
        (Request(model=Path("m"), data=["x.csv"]), r"'x.csv' is neither .jsonl nor .parquet"),
        (Request(model=Path("/nowhere/m"), data=["countdown"]), "model /nowhere/m does not exist"),
        (Request(model=Path("m"), data=["countdown"], stop_after_correct=1), "give at least 2"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(request_: Request, message: str) -> None:
    with pytest.raises(RapoError, match=message):
        run(request_)


def test_a_data_set_is_filed_under_its_label(tmp_path: Path) -> None:
    rows = [{"question": "1+1", "answer": "2"}]
    first, _ = load_held_out(configuration(tmp_path, rows, file={"label": "sums-1"}), TOKENIZER)
    assert (first.name, first.record.name) == ("sums-1", "sums-1")
    for source in ("countdown", "arithmetic"):
        table = {"source": source, "label": "mine"}
        config = configuration(tmp_path, rows).model_copy(
            update={"evaluate": Evaluate.model_validate({"data": table, "problems": 2})}
        )
        assert [one.name for one in load_held_out(config, TOKENIZER)] == ["mine"]


@pytest.mark.parametrize(("every", "steps"), [(None, [0, 7]), (2, [0, 2, 4, 6, 7]), (3, [0, 3, 6, 7])])
def test_it_is_evaluated_when_due(tmp_path: Path, every: int | None, steps: list[int]) -> None:
    options = {
        "run": {"directory": str(tmp_path), "steps": 7},
        "model": {"path": "model"},
        "data": {"source": "countdown"},
        "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
        "evaluate": {"problems": 1, **({"every": every} if every else {})},
    }
    alone = cast(Any, SimpleNamespace(placement=None))
    evaluator = Evaluator(validate(options, "test"), TOKENIZER, collector=alone, verifiers={})
    assert [step for step in range(8) if evaluator.due(step)] == steps
