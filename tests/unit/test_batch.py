"""Scored groups to microbatches: advantages and weights of each minibatch, each rank's share."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.policy.batch import batch_advantages, build_minibatches, make_samples
from tests.episodes import group_of, scored_response

VOCABULARY = 1000
LENGTHS = [[3, 7], [5, 1], [2, 8], [6, 4]]
CORRECT = [[True, False], [False, False], [True, True], [False, True]]


def scored(number: int) -> Group:
    """Token 100·group + 10·response fills each response, so that every token tells where it is from."""
    return group_of(
        *(
            scored_response(
                Outcome.CORRECT if correct else Outcome.WRONG,
                [100 * number + 10 * n + 1] * length,
                log_probs=-np.arange(1.0, length + 1),
            )
            for n, (length, correct) in enumerate(zip(LENGTHS[number], CORRECT[number], strict=True))
        ),
        number=number,
    )


def responses(*shapes: tuple[int, Outcome], truncated: Sequence[int] = ()) -> Group:
    """A group of given lengths and outcomes; the n-th is of token n + 1, and cut if `truncated` has n."""
    return group_of(
        *(
            scored_response(outcome, [n + 1] * length, truncated=n in truncated)
            for n, (length, outcome) in enumerate(shapes)
        )
    )


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
    """Of response tokens in the loss, by the token that is predicted."""
    found: dict[int, list[float]] = {}
    for microbatch in microbatches:
        for token, value, weight in zip(
            microbatch.targets.tolist(),
            getattr(microbatch, name).tolist(),
            microbatch.weights.tolist(),
            strict=True,
        ):
            if weight:
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


@pytest.mark.parametrize("parallel", [{"context_parallel": 2}, {"pipeline_parallel": 2}])
def test_microbatches_hold_what_they_may_with_their_padding(parallel: dict[str, int]) -> None:
    """The first minibatch's sequences are of 5, 9, 7 and 3 tokens, padded for CP to 8, 12, 8 and 4; for PP
    its microbatches are filled up to those of the second, of 4 + 10 and 8 + 6."""
    run = config(parallel, max_tokens_per_microbatch=20)
    ranks = run.parallel.context_parallel
    first = minibatches(run)[0]
    assert [len(microbatch.token_ids) * ranks for microbatch in first] == (
        [16, 16] if ranks == 2 else [14, 14]
    )
    assert [sorted(microbatch.lengths) for microbatch in first] == (
        [[4, 12], [8, 8]] if ranks == 2 else [[2, 3, 9], [2, 5, 7]]
    )


@pytest.mark.parametrize("reward", [-0.5, 1.5])
def test_rewards_for_which_phi_is_not_defined_are_an_error(
    monkeypatch: pytest.MonkeyPatch, reward: float
) -> None:
    rewards = np.ma.array([[0.0, 1.0], [reward, 1.0]])
    monkeypatch.setattr("megatron_rapo.policy.batch.known_rewards", lambda groups: rewards)
    with pytest.raises(
        ValueError, match=rf"from {min(reward, 0.0)} to {max(reward, 1.0)} are not all within"
    ):
        batch_advantages(GROUPS[:2], config())
    rewards[1, 0] = np.ma.masked  # unknown: it is never used
    assert batch_advantages(GROUPS[:2], config()).shape == (2, 2)


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
    predicted = {token for microbatches in batches for token in values(microbatches, "weights")}
    assert predicted == {1, 11, 101, 111, 201, 211, 301}
    last = sum(float(m.weights.sum()) for m in batches[1])
    assert last == pytest.approx(1.0)


C, W, T, X = Outcome.CORRECT, Outcome.WRONG, Outcome.TIMEOUT, Outcome.CRASH


def in_loss(groups: Sequence[Group], **algorithm: Any) -> list[list[bool]]:
    """Which responses of each group have weight in the loss."""
    run = config(minibatch_prompts=4, **algorithm)
    samples = iter(make_samples(groups, batch_advantages(groups, run), run, VOCABULARY))
    return [[next(samples).token_weight > 0 for _ in group.episodes] for group in groups]


@pytest.mark.parametrize(
    ("which", "mixed", "failed", "solved"),
    [("keep", True, True, True), ("keep_failed", True, True, False), ("drop", True, False, False)],
)
def test_which_groups_without_variance_stay(which: str, mixed: bool, failed: bool, solved: bool) -> None:
    groups = [responses((2, C), (3, W)), responses((2, W), (3, W)), responses((2, C), (3, C))]
    expected = [[kept] * 2 for kept in (mixed, failed, solved)]
    assert in_loss(groups, groups_without_variance=which) == expected


def test_responses_that_were_cut_leave_the_loss_where_asked_for() -> None:
    groups = [responses((2, C), (10, W), truncated=[1])]
    assert in_loss(groups, mask_truncated=True) == [[True, False]]
    assert in_loss(groups, mask_truncated=False) == [[True, True]]


def test_what_is_masked_weighs_in_no_normaliser() -> None:
    """The mean is over the tokens that are left: the weights of the loss's tokens add up to 1."""
    run = config(minibatch_prompts=4, mask_truncated=True)
    groups = [responses((2, C), (10, W), truncated=[1]), responses((3, C), (1, W))]
    samples = make_samples(groups, batch_advantages(groups, run), run, VOCABULARY)
    assert [sample.token_weight for sample in samples] == pytest.approx([1 / 6, 0, 1 / 6, 1 / 6])


def test_unknown_rewards_are_not_trained_on_and_change_nothing_for_the_others() -> None:
    groups = [responses((2, C), (3, T), (4, W), (1, W)), responses((2, C), (3, X), (4, X), (1, T))]
    assert in_loss(groups) == [[True, False, True, True], [True, False, False, False]]
    found = batch_advantages(groups, config())
    without = batch_advantages([responses((2, C), (4, W), (1, W))], config())
    assert found[0, [0, 2, 3]] == pytest.approx(without[0])
    assert found[0, 1] == 0.0
    assert (found[1] == 0.0).all()


@pytest.mark.parametrize(("which", "kept"), [("keep", True), ("keep_failed", True), ("drop", False)])
def test_groups_that_fail_as_far_as_is_known_count_as_failed(which: str, kept: bool) -> None:
    assert in_loss([responses((2, W), (3, T), (4, W))], groups_without_variance=which) == [
        [kept, False, kept]
    ]


@pytest.mark.parametrize("which", ["keep", "keep_failed", "drop"])
def test_a_step_of_unknown_rewards_has_nothing_in_the_loss(which: str) -> None:
    assert in_loss([responses((2, X), (3, T))], groups_without_variance=which) == [[False, False]]


def test_phi_sees_the_reward_that_was_earned_and_the_advantage_the_penalised_one() -> None:
    """Of a buffer of 4 and a limit of 10: 8 tokens lose ¼, 10 lose ½."""
    groups = [responses((2, C), (8, C), (10, W), (3, W))]
    run = config(minibatch_prompts=4, overlong_buffer_tokens=4)
    advantages = batch_advantages(groups, run)
    shaped = np.array([1.0, 0.75, -0.5, 0.0])
    assert advantages[0] == pytest.approx((shaped - shaped.mean()) / shaped.std(ddof=1))
    samples = make_samples(groups, advantages, run, VOCABULARY)
    assert [sample.reward for sample in samples] == [1.0, 1.0, 0.0, 0.0]
    assert batch_advantages(groups, config())[0] == pytest.approx(np.array([1, 1, -1, -1]) * 0.75**0.5)


def test_responses_of_one_length_inside_the_buffer_compare_as_without_it() -> None:
    groups = [responses((9, C), (9, C), (9, C))]
    assert (batch_advantages(groups, config(overlong_buffer_tokens=7)) == 0.0).all()


def test_the_minibatch_carries_rewards_to_the_tokens() -> None:
    """What flattens the reference: 1 at a correct response's tokens, 0 at a wrong one's."""
    first, second = (values(part, "rewards") for part in minibatches(config()))
    assert {token: set(found) for token, found in (first | second).items()} == {
        1: {1.0}, 11: {0.0}, 101: {0.0}, 111: {0.0}, 201: {1.0}, 211: {1.0}, 301: {0.0}, 311: {1.0},
    }  # fmt: skip
