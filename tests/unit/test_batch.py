"""Scored groups to microbatches: advantages and weights of each minibatch, each rank's share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.data.batching import Microbatch, Sample
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from tests.episodes import group_of, scored_response
from tests.methods import OF_REWARDS

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
    method = algorithm.get("method")
    teacher = {"teacher": {"path": "teacher"}} if method == "distill" else {}
    responses = {} if method == "sft" else {"responses_per_prompt": 2}
    return validate(
        {
            **teacher,
            "run": {"directory": "run", "steps": 2},
            "model": {"path": "model"},
            "parallel": parallel or {},
            "data": {"source": "arithmetic"},
            "rollout": {
                **responses,
                "prompts_per_step": 4,
                "max_prompt_tokens": 4,
                "max_response_tokens": 10,
            },
            "algorithm": options,
        },
        source="test",
    )


def minibatches(run: RunConfig, data_rank: int = 0, context_rank: int = 0) -> list[list[Microbatch]]:
    placement: Any = SimpleNamespace(data_rank=data_rank, context_rank=context_rank)
    samples = make_samples(GROUPS, run.new_method(), VOCABULARY, run.minibatch_prompts)
    return build_minibatches(samples, plan_minibatches(samples, run), run, placement)


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


def rewarded(monkeypatch: pytest.MonkeyPatch, *rewards: float | None) -> None:
    """Gives the responses of every group these rewards."""
    monkeypatch.setattr(Group, "rewards", property(lambda group: list(rewards)))


@pytest.mark.parametrize("reward", [-0.5, 1.5, math.inf, math.nan])
def test_a_reward_that_a_method_does_not_take_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, reward: float
) -> None:
    rewarded(monkeypatch, 1.0, reward)
    told = (
        rf'response 1 to problem 0 has reward {reward}, and method "dapo" takes finite rewards from 0 to 1;'
    )
    with pytest.raises(RapoError, match=told):
        samples_of(GROUPS[:2], config(method="dapo"))


@pytest.mark.parametrize("reward", [-1.5, 2.0])
def test_methods_that_compare_take_any_finite_reward(monkeypatch: pytest.MonkeyPatch, reward: float) -> None:
    rewarded(monkeypatch, 0.5, reward)
    samples = samples_of(GROUPS[:1], config())
    larger = reward > 0.5
    assert [sample.advantage > 0 for sample in samples] == [not larger, larger]
    assert [sample.phi for sample in samples] == pytest.approx([0.75, 1.0 if larger else 0.5])
    rewarded(monkeypatch, 0.5, math.nan)
    with pytest.raises(RapoError, match=r"has reward nan, and method \"rapo\" takes finite"):
        samples_of(GROUPS[:1], config())


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
    run = config()
    samples = make_samples(GROUPS, run.new_method(), 311, run.minibatch_prompts)
    batches = build_minibatches(samples, plan_minibatches(samples, run), run, placement)
    predicted = {token for microbatches in batches for token in values(microbatches, "weights")}
    assert predicted == {1, 11, 101, 111, 201, 211, 301}
    last = sum(float(m.weights.sum()) for m in batches[1])
    assert last == pytest.approx(1.0)


C, W, T, X = Outcome.CORRECT, Outcome.WRONG, Outcome.TIMEOUT, Outcome.CRASH


def samples_of(groups: Sequence[Group], run: RunConfig) -> list[Sample]:
    """All of them, as those of one minibatch."""
    (samples,) = make_samples(groups, run.new_method(), VOCABULARY, len(groups))
    return samples


def advantages_of(groups: Sequence[Group], run: RunConfig) -> np.ndarray:
    """`[groups, responses]`."""
    found = [sample.advantage for sample in samples_of(groups, run)]
    return np.array(found).reshape(len(groups), -1)


def in_loss(groups: Sequence[Group], **algorithm: Any) -> list[list[bool]]:
    """Which responses of each group have weight in the loss."""
    run = config(minibatch_prompts=4, **algorithm)
    samples = iter(samples_of(groups, run))
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
    samples = samples_of(groups, run)
    assert [sample.token_weight for sample in samples] == pytest.approx([1 / 6, 0, 1 / 6, 1 / 6])


def test_unknown_rewards_are_not_trained_on_and_change_nothing_for_the_others() -> None:
    groups = [responses((2, C), (3, T), (4, W), (1, W)), responses((2, C), (3, X), (4, X), (1, T))]
    assert in_loss(groups) == [[True, False, True, True], [True, False, False, False]]
    found = advantages_of(groups, config())
    without = advantages_of([responses((2, C), (4, W), (1, W))], config())
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


def test_an_overlong_penalty_lowers_what_is_compared() -> None:
    """Of a buffer of 4 and a limit of 10: 8 tokens lose ¼, 10 lose ½."""
    groups = [responses((2, C), (8, C), (10, W), (3, W))]
    advantages = advantages_of(groups, config(method="dapo", overlong_buffer_tokens=4))
    shaped = np.array([1.0, 0.75, -0.5, 0.0])
    assert advantages[0] == pytest.approx((shaped - shaped.mean()) / shaped.std(ddof=1))
    without = advantages_of(groups, config(method="dapo"))[0]
    assert without == pytest.approx(np.array([1, 1, -1, -1]) * 0.75**0.5)


@pytest.mark.parametrize("method", OF_REWARDS)
def test_groups_may_be_of_different_sizes(method: str) -> None:
    """Each compares its own episodes: those of the smaller group as if it were alone."""
    small, large = responses((3, C), (2, W)), responses((1, W), (4, C), (2, C), (1, W))
    samples = samples_of([small, large], config(method=method))
    assert [sample.sequence.sampled_tokens for sample in samples] == [3, 2, 1, 4, 2, 1]
    if method not in ("lite_ppo", "dgpo"):  # which look at the whole batch
        alone = samples_of([small], config(method=method))
        assert [s.advantage for s in samples[:2]] == pytest.approx([s.advantage for s in alone])
    assert all(sample.token_weight > 0 for sample in samples)


def test_responses_of_one_length_inside_the_buffer_compare_as_without_it() -> None:
    groups = [responses((9, C), (9, C), (9, C))]
    assert (advantages_of(groups, config(method="dapo", overlong_buffer_tokens=7)) == 0.0).all()


def test_the_minibatch_carries_to_the_tokens_what_flattens_the_reference() -> None:
    """1 at a correct response's tokens, φ0 at a wrong one's."""
    first, second = (values(part, "phi") for part in minibatches(config()))
    assert {token: set(found) for token, found in (first | second).items()} == {
        1: {1.0}, 11: {0.5}, 101: {0.5}, 111: {0.5}, 201: {1.0}, 211: {1.0}, 301: {0.5}, 311: {1.0},
    }  # fmt: skip
