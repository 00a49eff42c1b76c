"""Mixtures of sources: their options, their reports, and their own rewards."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from megatron_rapo.config import MixtureData, to_toml, validate
from megatron_rapo.config.load import load_config
from megatron_rapo.data.load import load_training_prompts
from megatron_rapo.data.order import order_of
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.held_out import load_held_out
from megatron_rapo.record import identity
from megatron_rapo.record.identity import prompts_fingerprint
from megatron_rapo.reward.by_source import judge_by_source
from tests.models import make_tokenizer

TOKENIZER = make_tokenizer(vocab_size=200)
COUNTDOWN = {"source": "countdown", "numbers": 3, "problems": 20, "weight": 3.0, "label": "numbers"}
SUMS = {"source": "arithmetic", "problems": 12, "weight": 1.0, "label": "sums"}


def values(*sources: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "run": {"directory": "runs/mixed", "steps": 1},
        "model": {"path": "models/tiny"},
        "data": {"source": "mixture", "sources": list(sources), **data},
        "rollout": {"prompts_per_step": 8, "max_response_tokens": 8},
        "evaluate": {"problems": 4, "k": [1], "samples": 1},
    }


def mixture(*sources: dict[str, Any], **data: Any) -> Any:
    return validate(values(*sources, **data), source="run.toml")


def test_a_mixture_is_of_its_sources_by_weight() -> None:
    config = mixture(COUNTDOWN, SUMS)
    loaded = load_training_prompts(config, TOKENIZER)
    assert loaded.shares == (0.75, 0.25)
    assert [len(one) for one in loaded.sets] == [20, 12]
    first, second = loaded.report.splitlines()
    assert first.startswith("numbers (75.0% of prompts): countdown (numbers = 3")
    assert second.startswith("sums (25.0% of prompts): arithmetic (")
    drawn = order_of(loaded, seed=1).draw(8)
    assert sorted(prompt.source for prompt in drawn) == ["numbers"] * 6 + ["sums"] * 2


def test_each_source_is_rewarded_by_what_suits_it_or_by_its_own() -> None:
    config = mixture(COUNTDOWN, SUMS)
    assert [str(config.verifier_of(data)) for data in config.training_sources] == ["countdown", "integer"]
    config = mixture(COUNTDOWN, {**SUMS, "reward": {"verifier": "math"}})
    assert [str(config.verifier_of(data)) for data in config.training_sources] == ["countdown", "math"]
    with pytest.raises(RapoError, match=r'reward\.verifier = "math" cannot check .* "countdown"'):
        validate(values(COUNTDOWN, SUMS) | {"reward": {"verifier": "math"}}, source="run.toml")


def test_held_out_problems_are_those_of_each_source() -> None:
    config = mixture(COUNTDOWN, SUMS)
    assert config.evaluation_tables == ["data.sources[0]", "data.sources[1]"]
    assert [(one.name, len(one.prompts)) for one in load_held_out(config, TOKENIZER)] == [
        ("numbers", 4),
        ("sums", 4),
    ]


def test_a_mixture_is_written_as_it_is_read(tmp_path: Any) -> None:
    data = {"sources": [{"source": "arithmetic", "weight": 2.0}, {"source": "countdown", "weight": 0.5}]}
    config = validate(values() | {"data": {"source": "mixture", **data}}, source="run.toml")
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config([path]) == config
    assert isinstance(config.data, MixtureData)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([COUNTDOWN], "data.sources has 1, which is no mixture; name two or more"),
        ([], "data.sources has 0, which is no mixture"),
        ([COUNTDOWN, {**SUMS, "weight": 0.0}], "data.sources[1].weight = 0.0: must be greater than 0"),
        ([COUNTDOWN, {**SUMS, "weight": None}], "data.sources[1].weight is missing; set it"),
        ([COUNTDOWN, COUNTDOWN], 'data.sources has "numbers" 2 times; tell them apart by label'),
        ([COUNTDOWN, {**SUMS, "digit": 3}], "data.sources[1].digit = 3 is not an option"),
        (
            [COUNTDOWN, {"source": "mixture", "sources": []}],
            'data.sources[1].source = "mixture" is not one of',
        ),
        ([COUNTDOWN, {"weight": 1.0}], "data.sources[1].source is missing"),
    ],
)
def test_what_is_no_mixture_is_refused(sources: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RapoError) as told:
        mixture(*sources)
    assert message in str(told.value)


def test_a_weight_outside_of_a_mixture_is_refused() -> None:
    alone = values() | {"data": SUMS}
    with pytest.raises(
        RapoError, match=r"data\.weight = 1\.0 would have no effect: it is in no mixture; remove it"
    ):
        validate(alone, source="run.toml")
    with_evaluation = values(COUNTDOWN, SUMS)
    with_evaluation["evaluate"]["data"] = [SUMS]
    with pytest.raises(RapoError, match=r"evaluate\.data\.weight = 1\.0 would have no effect"):
        validate(with_evaluation, source="run.toml")


def test_a_source_must_last_for_a_step() -> None:
    config = mixture({**COUNTDOWN, "problems": 5}, SUMS)
    with pytest.raises(
        RapoError, match=r"8 is more than the 5 prompts of countdown .* share of 75\.0%.*to 6 or"
    ):
        load_training_prompts(config, TOKENIZER)


def test_a_file_in_a_mixture_needs_held_out_data(tmp_path: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "1+1", "answer": 2}))
    with pytest.raises(RapoError, match=r"evaluate\.data is missing"):
        mixture(SUMS, {"source": "file", "path": str(path), "weight": 1.0})


def test_answers_are_judged_by_the_verifier_of_their_problem_s_source() -> None:
    class Judges:
        def __init__(self, name: str) -> None:
            self.name = name

        async def score(self, answer: str, problem: Problem) -> Any:
            return self.name, answer, problem.id

    verifiers: Any = {source: Judges(f"of {source}") for source in "abc"}
    judge = judge_by_source(verifiers)
    problems = [Problem(str(number), "?", source=source) for number, source in enumerate("abcba")]
    found = [asyncio.run(judge("yes", problem)) for problem in problems]  # type: ignore[arg-type]
    assert found == [(f"of {problem.source}", "yes", problem.id) for problem in problems]


def test_fingerprints_of_prompts_differ_with_their_order_and_columns() -> None:
    prompts = load_training_prompts(mixture(COUNTDOWN, SUMS), TOKENIZER).prompts
    other = [replace(prompts[0], columns={"level": 1}), *prompts[1:]]
    assert len({prompts_fingerprint(found) for found in (prompts, prompts[::-1], other)}) == 3


def test_a_run_goes_on_with_the_same_weights_alone(monkeypatch: Any) -> None:
    for name in ("weights_fingerprint", "tokenizer_fingerprint"):
        monkeypatch.setattr(identity, name, lambda path: "same")
    config = mixture(COUNTDOWN, SUMS)
    prompts = load_training_prompts(config, TOKENIZER).prompts
    begun = identity.Identity.of(config, prompts, {})
    other = identity.Identity.of(mixture(COUNTDOWN, {**SUMS, "weight": 2.0}), prompts, {})
    assert begun.differences(other) == ["other weights or shuffling of data.sources"]
    changed = [replace(one, answer="0") if one.index < 2 else one for one in prompts]
    assert begun.differences(identity.Identity.of(config, changed, {})) == [
        "other training prompts (another answer in rows numbers 0, numbers 1, sums 0 and 1 more)"
    ]
