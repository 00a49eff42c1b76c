"""Scored groups to microbatches: advantages and weights of each minibatch, each rank's share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.policy.batch import build_minibatches
from megatron_rapo.reward.outcome import Outcome
from megatron_rapo.reward.scoring import ScoredGroup
from megatron_rapo.rollout.groups import Response

VOCABULARY = 1000
LENGTHS = [[3, 7], [5, 1], [2, 8], [6, 4]]
CORRECT = [[True, False], [False, False], [True, True], [False, True]]


def scored(number: int) -> ScoredGroup:
    """Token 100·group + 10·response fills each response, so that every token tells where it is from."""
    responses = tuple(
        Response(
            np.full(length, 100 * number + 10 * n + 1, np.int32),
            -np.arange(1, length + 1, dtype=np.float32),
            0,
            "stop",
        )
        for n, length in enumerate(LENGTHS[number])
    )
    outcomes = tuple(Outcome.CORRECT if correct else Outcome.WRONG for correct in CORRECT[number])
    return ScoredGroup(Prompt(number, "?", (7, 8), "!"), responses, outcomes)


GROUPS = [scored(number) for number in range(4)]


def config(parallel: dict[str, Any] | None = None, **algorithm: Any) -> RunConfig:
    options = {"minibatch_prompts": 2, "max_tokens_per_microbatch": 16, **algorithm}
    return validate(
        {
            "run": {"directory": "run", "steps": 2},
            "model": {"path": "model"},
            "parallel": parallel or {},
            "data": {"source": "arithmetic"},
            "rollout": {
                "prompts_per_step": 4,
                "responses_per_prompt": 2,
                "max_prompt_tokens": 4,
                "max_response_tokens": 10,
            },
            "algorithm": options,
        },
        source="test",
    )


def minibatches(run: RunConfig, data_rank: int = 0, context_rank: int = 0) -> list[list[Microbatch]]:
    placement: Any = SimpleNamespace(data_rank=data_rank, context_rank=context_rank)
    return build_minibatches(GROUPS, run, placement, VOCABULARY)


def values(microbatches: list[Microbatch], name: str) -> dict[int, list[float]]:
    """Of response tokens, by the token that is predicted."""
    found: dict[int, list[float]] = {}
    for microbatch in microbatches:
        for token, value, counts in zip(
            microbatch.targets.tolist(),
            getattr(microbatch, name).tolist(),
            microbatch.is_response,
            strict=True,
        ):
            if counts:
                found.setdefault(token, []).append(value)
    return found


def test_each_minibatch_holds_its_groups_whole() -> None:
    first, second = minibatches(config())
    assert {token: len(found) for token, found in values(first, "weights").items()} == {
        1: 3,
        11: 7,
        101: 5,
        111: 1,
    }
    assert {token: len(found) for token, found in values(second, "weights").items()} == {
        201: 2,
        211: 8,
        301: 6,
        311: 4,
    }


def test_advantages_compare_the_responses_of_one_prompt() -> None:
    """(r − mean) / std with the sample's std: ±1/√2 for one of two; 0 where both earn the same."""
    half = 0.5**0.5
    found = [values(part, "advantages") for part in minibatches(config())]
    assert found[0] == {
        1: pytest.approx([half] * 3),
        11: pytest.approx([-half] * 7),
        101: [0.0] * 5,
        111: [0.0],
    }
    assert found[1][301] == pytest.approx([-half] * 6)
    assert found[1][311] == pytest.approx([half] * 4)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", {1: 1 / 16, 11: 1 / 16, 101: 1 / 16, 111: 1 / 16}),
        ("sequence_mean", {1: 1 / 12, 11: 1 / 28, 101: 1 / 20, 111: 1 / 4}),
        ("constant", {1: 1 / 40, 11: 1 / 40, 101: 1 / 40, 111: 1 / 40}),
    ],
)
def test_weights_normalise_over_the_whole_minibatch(aggregation: str, expected: dict[int, float]) -> None:
    found = values(minibatches(config(loss_aggregation=aggregation))[0], "weights")
    assert {token: weights[0] for token, weights in found.items()} == pytest.approx(expected)
    assert all(len(set(weights)) == 1 for weights in found.values())


def test_replicas_share_a_minibatch_between_them() -> None:
    run = config({"data_parallel": 2})
    shares = [values(minibatches(run, data_rank=rank)[0], "weights") for rank in range(2)]
    assert not shares[0].keys() & shares[1].keys()
    assert shares[0] | shares[1] == values(minibatches(config())[0], "weights")


def test_context_ranks_share_each_sequence() -> None:
    run = config({"context_parallel": 2})
    parts = [minibatches(run, context_rank=rank)[0] for rank in range(2)]
    tokens = [sum(int(microbatch.is_response.sum()) for microbatch in part) for part in parts]
    assert sum(tokens) == 16
    assert min(tokens) > 0


def test_pipeline_stages_exchange_one_shape() -> None:
    """Over all minibatches; and under the interleaved schedule a multiple of PP in number."""
    run = config({"pipeline_parallel": 2, "virtual_pipeline_parallel": 2})
    parts = minibatches(run)
    assert len({len(microbatch.token_ids) for part in parts for microbatch in part}) == 1
    assert all(len(part) % 2 == 0 for part in parts)


def test_a_warm_up_that_never_ends_is_refused() -> None:
    options = config().resolved()
    options["optimizer"]["warmup_updates"] = 4
    with pytest.raises(
        RapoError, match=r"warmup_updates = 4 leaves none of the run's 4 updates at the full rate"
    ):
        validate(options, source="test")


def test_a_response_with_a_token_that_does_not_exist_is_masked() -> None:
    """The last group's last response is of token 311, which a tokenizer of 311 tokens lacks."""
    placement: Any = SimpleNamespace(data_rank=0, context_rank=0)
    batches = build_minibatches(GROUPS, config(), placement, 311)
    predicted = {int(t) for microbatches in batches for m in microbatches for t in m.targets[m.is_response]}
    assert predicted == {1, 11, 101, 111, 201, 211, 301}
    last = sum(float(m.weights.sum()) for m in batches[1])
    assert last == pytest.approx(1.0)
