"""Training samples into packed microbatches: balanced over data parallelism, within a token budget."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rapo.episode.brief import BriefSequence
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.parallel.context import rank_major_order

Plan = list[list[list[int]]]
"""Which of a minibatch's sequences go where: `[replica][microbatch]`, numbers of sequences."""


@dataclass(frozen=True)
class Sample:
    """One sequence with what the loss needs of it.

    Attributes:
        sequence: tokens, of which some are trained on (`Sequence.trained`); brief where it is planned with.
        phi: the power that flattens the reference.
        advantage: of all its trained tokens, or one of each, `[trained tokens]`.
        token_weight: weight of a trained token in the minibatch's loss, or one of each; 0: it is masked out.
        has_probability: whether all its tokens exist; where not, it is not even measured.
        off_policy: whether its log-probs are of another distribution than the policy's.
        marks: the method's numbers by name, of all its trained tokens or one of each; every sample has all.
    """

    sequence: TokenSequence | BriefSequence
    phi: float
    advantage: float | npt.NDArray[np.floating]
    token_weight: float | npt.NDArray[np.floating]
    has_probability: bool = True
    off_policy: bool = False
    marks: Mapping[str, float | npt.NDArray[np.floating]] = field(default_factory=dict)


@dataclass
class Microbatch:
    """Packed sequences, this context-parallel rank's tokens of them.

    Position t predicts `targets[t]`, the next token of its sequence. Fields over tokens are `[tokens / CP]`.

    Attributes:
        token_ids, position_ids, targets: int64.
        weights: fp32, of the token in the minibatch's loss; 0 where it takes no part.
        phi, advantages, engine_log_probs: fp32, of the predicted token; log-probs are 0 of given ones.
        response_positions: int64, of the predicted token among its sequence's trained ones; −1 where it is
            none of them.
        sequences: int64, which of the packed sequences the position belongs to.
        off_policy: bool, whether the predicted token's log-prob is of another distribution than the policy's.
        marks: fp32, the method's numbers of the predicted token by name.
        lengths: padded length of each sequence, over all CP ranks.
        old_log_probs: fp32, under the policy that starts the step; None: the policy has not moved yet.
        old_entropies: fp32, of its distributions; None where no method asks for them.
        tempered_log_probs: fp32, as old_log_probs at another temperature; None where no method asks.
        reference_hidden: `[tokens / CP (/ TP under sequence parallelism), hidden]`, the reference's final
            hidden states, from which its head makes logits.
        teacher_hidden: of the teacher, likewise; its own hidden size.
        reference_log_probs, flattened_log_probs: `[response tokens]` fp32, under the reference as it is, and
            flattened by φ.
    """

    token_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    weights: Tensor
    phi: Tensor
    advantages: Tensor
    engine_log_probs: Tensor
    response_positions: Tensor
    sequences: Tensor
    off_policy: Tensor
    marks: dict[str, Tensor]
    lengths: list[int]
    old_log_probs: Tensor | None = None
    old_entropies: Tensor | None = None
    tempered_log_probs: Tensor | None = None
    reference_hidden: Tensor | None = None
    teacher_hidden: Tensor | None = None
    reference_log_probs: Tensor | None = None
    flattened_log_probs: Tensor | None = None

    @property
    def is_response(self) -> Tensor:
        """`[tokens / CP]` bool: whether a trained token is predicted, be it masked out of the loss."""
        return self.response_positions >= 0


def padded_length(tokens: int, multiple: int) -> int:
    """`tokens` rounded up to a multiple."""
    return -(-tokens // multiple) * multiple


def plan_microbatches(
    lengths: Sequence[int], *, replicas: int, token_budget: int, count_multiple: int = 1
) -> Plan:
    """Which sequences go into which microbatch of which replica.

    Sequences are spread so that replicas hold about the same number of tokens, and so do a replica's
    microbatches. All replicas get the same number of microbatches, so that their pipelines and collectives
    stay in step; where sequences are too few, some microbatches are empty. The plan is a pure function of
    its arguments: every rank makes it for itself.

    Args:
        lengths: padded length of each sequence, each at most `token_budget`.
        replicas: data-parallel size.
        token_budget: tokens of a microbatch.
        count_multiple: the number of microbatches is a multiple of this (PP under the interleaved schedule).

    Returns:
        `[replica][microbatch]`, indices into `lengths`.
    """
    shares = _balance(range(len(lengths)), lengths, replicas)
    needed = max(len(_first_fit(share, lengths, token_budget)) for share in shares)
    count = padded_length(max(1, needed), count_multiple)
    return [_fill(share, lengths, token_budget, count) for share in shares]


def replicas_of(plan: Plan) -> list[int]:
    """The replica that trains on each sequence."""
    trains = {n: replica for replica, parts in enumerate(plan) for part in parts for n in part}
    return [trains[number] for number in range(len(trains))]


def _balance(items: Iterable[int], lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Longest first, each to the bin that holds the fewest tokens."""
    loads = [(0, b) for b in range(bins)]
    filled: list[list[int]] = [[] for _ in range(bins)]
    for index in sorted(items, key=lambda i: (-lengths[i], i)):
        load, b = heapq.heappop(loads)
        filled[b].append(index)
        heapq.heappush(loads, (load + lengths[index], b))
    return filled


def _first_fit(share: Sequence[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Each, in the order given (longest first), to the first bin with room; as many bins as it takes."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in share:
        place = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(token_budget)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def _fill(share: Sequence[int], lengths: Sequence[int], token_budget: int, count: int) -> list[list[int]]:
    """`count` microbatches of about the same size; first-fit where balance would break the budget."""
    balanced = _balance(share, lengths, count)
    if all(sum(lengths[i] for i in b) <= token_budget for b in balanced):
        return balanced
    bins = _first_fit(share, lengths, token_budget)
    return bins + [[] for _ in range(count - len(bins))]


_INTEGERS = ("token_ids", "position_ids", "targets", "response_positions")
_FLOATS = ("weights", "phi", "advantages", "engine_log_probs")


def pack(
    samples: Sequence[Sample],
    *,
    sequence_multiple: int,
    total_tokens: int | None = None,
    mark_names: Iterable[str] = (),
    context_rank: int = 0,
    context_ranks: int = 1,
    device: torch.device | None = None,
) -> Microbatch:
    """Packs samples into one microbatch; none at all make a microbatch of padding.

    Args:
        samples: the sequences, in order.
        sequence_multiple: each is padded to a multiple of this.
        total_tokens: sequences of padding fill the microbatch up to this many tokens (pipeline stages
            exchange tensors of one shape). Default: none.
        mark_names: of the samples' marks.
        context_rank, context_ranks: whose tokens to keep.
        device: where the tensors go.
    """
    lengths = [padded_length(len(sample.sequence), sequence_multiple) for sample in samples]
    longest = max(lengths, default=sequence_multiple)
    missing = max(total_tokens or 0, sequence_multiple) - sum(lengths)
    while missing > 0:
        lengths.append(min(missing, longest))
        missing -= lengths[-1]
    total = sum(lengths)
    integers = {name: np.zeros(total, np.int64) for name in _INTEGERS}
    integers["response_positions"] -= 1
    floats = {name: np.zeros(total, np.float32) for name in _FLOATS}
    marks = {name: np.zeros(total, np.float32) for name in mark_names}
    off_policy = np.zeros(total, bool)
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    start = 0
    for sample, length in zip(samples, lengths, strict=False):
        sequence = sample.sequence
        tokens = len(sequence)
        integers["token_ids"][start : start + tokens] = sequence.token_ids
        integers["targets"][start : start + tokens - 1] = sequence.token_ids[1:]
        integers["position_ids"][start : start + length] = np.arange(length)
        chosen = np.flatnonzero(sequence.trained)
        predicting = start + chosen - 1  # a trained token is never its sequence's first
        if sample.has_probability:
            integers["response_positions"][predicting] = np.arange(len(chosen))
        floats["weights"][predicting] = sample.token_weight
        floats["phi"][predicting] = sample.phi
        floats["advantages"][predicting] = sample.advantage
        floats["engine_log_probs"][predicting] = np.nan_to_num(sequence.log_probs[chosen])
        off_policy[predicting] = sample.off_policy
        for name, values in sample.marks.items():
            marks[name][predicting] = values
        start += length
    mine = rank_major_order(lengths, context_ranks)[context_rank].numpy()

    def of_this_rank(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array[mine]).to(device) for name, array in arrays.items()}

    fields: dict[str, npt.NDArray[Any]] = {
        **integers,
        **floats,
        "sequences": sequences,
        "off_policy": off_policy,
    }
    return Microbatch(lengths=lengths, marks=of_this_rank(marks), **of_this_rank(fields))
