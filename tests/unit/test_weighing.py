"""Weights of tokens that a method makes of what the policy made of them, on one rank and on several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rapo.data.batching import Microbatch, Sample, pack
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.dapo import DAPO
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.policy.weighing import weigh
from megatron_rapo.testing.ranks import on_ranks
from tests.episodes import random_sequence
from tests.ranks import replica_of
from tests.unit.one_rank import one_rank

TOKENS = 3 + 8 + 5 + 1


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


class UpperHalf(DAPO):
    """Keeps the tokens with the largest |A| · H of the minibatch, whichever rank has them."""

    def weigh(self, tokens: Annotated) -> torch.Tensor:
        score = tokens.advantages.abs() * tokens.old_entropies
        median = tokens.of_all_ranks(score).median()
        kept = tokens.weights * (score > median)
        return kept / tokens.of_all_ranks(kept).sum()


def samples() -> list[Sample]:
    random = np.random.default_rng(0)
    return [
        Sample(random_sequence(random, 2, tokens), 1.0, float(random.normal()), 1 / TOKENS)
        for tokens in (3, 8, 5, 1)
    ]


def microbatches(*which: list[int]) -> list[Microbatch]:
    """A microbatch each of the samples named; entropies are functions of the tokens."""
    found = [pack([samples()[index] for index in chosen], sequence_multiple=4) for chosen in which]
    for microbatch in found:
        microbatch.old_log_probs = microbatch.engine_log_probs.clone()
        microbatch.old_entropies = (microbatch.targets * 0.37).sin().abs()
    return found


def weights_of(minibatch: list[Microbatch]) -> dict[tuple[int, int], float]:
    """By token and its place in the response, which together name it."""
    found = {}
    for microbatch in minibatch:
        at = microbatch.is_response
        names = zip(microbatch.targets[at].tolist(), microbatch.response_positions[at].tolist(), strict=True)
        found |= dict(zip(names, microbatch.weights[at].tolist(), strict=True))
    return found


def a(method: type[DAPO]) -> DAPO:
    return method(DAPO.Options(), Sampling(1.0, 2, 64))


def test_what_all_ranks_decide_does_not_depend_on_who_has_which_token() -> None:
    """Two microbatches on one rank; or one each on three ranks, of which one has no response tokens."""

    def on_one(group: dist.ProcessGroup) -> Any:
        minibatch = microbatches([0, 1], [2, 3])
        weigh([minibatch], a(UpperHalf), replica_of(group))
        return weights_of(minibatch)

    def on_three(group: dist.ProcessGroup) -> Any:
        minibatch = microbatches([[3, 1], [], [0, 2]][group.rank()])
        weigh([minibatch], a(UpperHalf), replica_of(group))
        return weights_of(minibatch)

    (alone,) = on_ranks(1, on_one)
    first, second, third = on_ranks(3, on_three)
    assert second == {}
    assert first | third == pytest.approx(alone)
    assert len(alone) == TOKENS
    kept = [weight for weight in alone.values() if weight > 0]
    assert len(kept) == TOKENS // 2
    assert sum(kept) == pytest.approx(1.0)


def test_by_default_weights_stay_as_they_are() -> None:
    def work(group: dist.ProcessGroup) -> Any:
        minibatch = microbatches([0, 1])
        before = minibatch[0].weights.clone()
        minibatch[0].old_entropies = None  # there are none
        weigh([minibatch], a(DAPO), replica_of(group))
        return torch.equal(minibatch[0].weights, before)

    assert on_ranks(1, work) == [True]


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (lambda t: t.weights[:2], r"returned \(2,\), for 11 tokens; return a tensor of one weight"),
        (lambda t: t.weights - 1.0, r"returned \(11,\), some of which are negative or not finite"),
        (lambda t: t.weights / 0.0, r"returned \(11,\), some of which are negative or not finite"),
        (lambda t: None, r"returned NoneType, for 11 tokens"),
    ],
)
def test_what_are_no_weights_ends_the_run(weights: Any, told: str) -> None:
    class Wrong(DAPO):
        def weigh(self, tokens: Annotated) -> torch.Tensor:
            return weights(tokens)

    def work(group: dist.ProcessGroup) -> None:
        weigh([microbatches([0, 1])], a(Wrong), replica_of(group))

    with pytest.raises(RapoError, match=told):
        on_ranks(1, work)
