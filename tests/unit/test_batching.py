"""Microbatch plans by their properties, and packing token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rapo.data.batching import Microbatch, Sample, pack, padded_length, plan_microbatches
from megatron_rapo.episode.sequence import Sequence

BUDGET = 64
plans = given(
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=40),
    replicas=st.integers(1, 5),
    multiple=st.integers(1, 4),
)


@plans
def test_a_plan_holds_each_sequence_once_within_the_budget(
    lengths: list[int], replicas: int, multiple: int
) -> None:
    plan = plan_microbatches(lengths, replicas=replicas, token_budget=BUDGET, count_multiple=multiple)
    microbatches = [microbatch for share in plan for microbatch in share]
    assert sorted(index for microbatch in microbatches for index in microbatch) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in microbatch) <= BUDGET for microbatch in microbatches)


@plans
def test_replicas_stay_in_step(lengths: list[int], replicas: int, multiple: int) -> None:
    plan = plan_microbatches(lengths, replicas=replicas, token_budget=BUDGET, count_multiple=multiple)
    (count,) = {len(share) for share in plan}
    assert len(plan) == replicas
    assert count >= 1
    assert count % multiple == 0


@plans
def test_replicas_carry_alike(lengths: list[int], replicas: int, multiple: int) -> None:
    """Longest first to the emptiest: loads differ by no more than one longest sequence."""
    plan = plan_microbatches(lengths, replicas=replicas, token_budget=BUDGET, count_multiple=multiple)
    loads = [sum(lengths[index] for microbatch in share for index in microbatch) for share in plan]
    assert max(loads) - min(loads) <= max(lengths)


@given(lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=30), data=st.data())
def test_the_order_of_the_sequences_does_not_matter(lengths: list[int], data: st.DataObject) -> None:
    def loads(order: list[int]) -> list[list[list[int]]]:
        plan = plan_microbatches(order, replicas=3, token_budget=BUDGET)
        return [[sorted(order[index] for index in microbatch) for microbatch in share] for share in plan]

    assert loads(data.draw(st.permutations(lengths))) == loads(lengths)


def test_no_more_microbatches_than_needed() -> None:
    assert plan_microbatches([32, 32, 32, 32], replicas=2, token_budget=64) == [[[0, 2]], [[1, 3]]]


def test_microbatches_of_a_replica_carry_alike() -> None:
    """One after the other to the first with room, they would carry 60 and 20 tokens."""
    ((one, other),) = plan_microbatches([30, 20, 20, 10], replicas=1, token_budget=64)
    assert (sorted(one), sorted(other)) == ([0, 3], [1, 2])


def test_too_few_sequences_leave_microbatches_empty() -> None:
    assert plan_microbatches([8], replicas=2, token_budget=64, count_multiple=2) == [[[0], []], [[], []]]


# Packing


def sample(prompt: int, response: int, first: int = 10) -> Sample:
    """Tokens are numbered from `first`, engine log-probs are minus the token, so that each is told apart."""
    ids = np.arange(first, first + prompt + response, dtype=np.int32)
    return Sample(
        sequence=Sequence.of_response(
            ids[:prompt], ids[prompt:], -ids[prompt:].astype(np.float32), version=0
        ),
        phi=float(first),
        advantage=first + 0.5,
        token_weight=first / 100,
    )


def test_each_position_predicts_the_next_token_of_its_sequence() -> None:
    packed = pack([sample(2, 2), sample(1, 3, first=50)], sequence_multiple=1)
    assert packed.lengths == [4, 4]
    assert packed.token_ids.tolist() == [10, 11, 12, 13, 50, 51, 52, 53]
    assert packed.targets.tolist() == [11, 12, 13, 0, 51, 52, 53, 0]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert packed.sequences.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_only_predictions_of_response_tokens_count() -> None:
    """The last prompt token predicts the first response token; the last response token predicts nothing."""
    packed = pack([sample(2, 2), sample(1, 3, first=50)], sequence_multiple=1)
    assert packed.is_response.tolist() == [False, True, True, False, True, True, True, False]
    assert packed.weights.tolist() == pytest.approx([0, 0.1, 0.1, 0, 0.5, 0.5, 0.5, 0])
    assert packed.phi.tolist() == [0, 10, 10, 0, 50, 50, 50, 0]
    assert packed.advantages.tolist() == [0, 10.5, 10.5, 0, 50.5, 50.5, 50.5, 0]
    assert packed.engine_log_probs.tolist() == [0, -12, -13, 0, -51, -52, -53, 0]
    assert packed.response_positions.tolist() == [-1, 0, 1, -1, 0, 1, 2, -1]


def test_several_sampled_spans_count_and_what_is_given_between_them_does_not() -> None:
    """Each with an advantage and a weight of its own: prompt 10, sampled 11 and 12, given 13, sampled 14."""
    mask = np.array([False, True, True, False, True])
    sequence = Sequence(
        token_ids=np.arange(10, 15, dtype=np.int32),
        sampled=mask,
        log_probs=np.where(mask, -np.arange(10, 15), np.nan).astype(np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
    )
    several = Sample(sequence, 1.0, np.array([0.5, 1.5, 2.5]), np.array([0.1, 0.2, 0.3]))
    packed = pack([sample(1, 1, first=50), several], sequence_multiple=1)
    assert packed.targets.tolist() == [51, 0, 11, 12, 13, 14, 0]
    assert packed.is_response.tolist() == [True, False, True, True, False, True, False]
    assert packed.response_positions.tolist() == [0, -1, 0, 1, -1, 2, -1]
    assert packed.advantages.tolist() == [50.5, 0, 0.5, 1.5, 0, 2.5, 0]
    assert packed.weights.tolist() == pytest.approx([0.5, 0, 0.1, 0.2, 0, 0.3, 0])
    assert packed.engine_log_probs.tolist() == [-51, 0, -11, -12, 0, -14, 0]


samples = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=5).map(
    lambda lengths: [
        sample(prompt, response, first=100 * (n + 1)) for n, (prompt, response) in enumerate(lengths)
    ]
)


@given(chosen=samples, context_ranks=st.integers(1, 4), extra=st.integers(0, 3))
@settings(deadline=None)
def test_context_ranks_partition_the_tokens(chosen: list[Sample], context_ranks: int, extra: int) -> None:
    multiple = 2 * context_ranks
    total = sum(padded_length(len(s.sequence), multiple) for s in chosen) + extra * multiple

    def part(rank: int, ranks: int) -> Microbatch:
        return pack(
            chosen, sequence_multiple=multiple, total_tokens=total, context_rank=rank, context_ranks=ranks
        )

    whole, parts = part(0, 1), [part(rank, context_ranks) for rank in range(context_ranks)]
    for name in (
        "token_ids",
        "position_ids",
        "targets",
        "weights",
        "phi",
        "advantages",
        "engine_log_probs",
    ):
        together = torch.cat([getattr(each, name) for each in parts])
        assert sorted(together.tolist()) == sorted(getattr(whole, name).tolist()), name
    sizes = {len(each.token_ids) for each in parts}
    assert sizes == {len(whole.token_ids) // context_ranks}
    assert all(each.lengths == whole.lengths for each in parts)


@given(chosen=samples, multiple=st.integers(1, 8), total=st.integers(0, 200))
def test_padding_is_inert(chosen: list[Sample], multiple: int, total: int) -> None:
    total = padded_length(total, multiple)
    packed = pack(chosen, sequence_multiple=multiple, total_tokens=total)
    needed = sum(padded_length(len(s.sequence), multiple) for s in chosen)
    assert len(packed.token_ids) == sum(packed.lengths) == max(needed, total, multiple)
    assert all(length % multiple == 0 and length > 0 for length in packed.lengths)
    assert int(packed.is_response.sum()) == sum(s.sequence.sampled_tokens for s in chosen)
    assert float(packed.weights.sum()) == pytest.approx(
        sum(s.token_weight * s.sequence.sampled_tokens for s in chosen), rel=1e-5
    )


def test_no_sample_at_all_makes_padding() -> None:
    packed = pack([], sequence_multiple=4)
    assert packed.lengths == [4]
    assert not packed.is_response.any()
