"""Training samples into packed microbatches: balanced over data parallelism, within a token budget."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rapo.parallel.context import rank_major_order


@dataclass(frozen=True)
class Sample:
    """One response with what the loss needs of it.

    Attributes:
        token_ids: `[prompt + response]` int32.
        prompt_tokens: how many of them are the prompt.
        engine_log_probs: `[response]` float32, as sampled.
        reward: of the response.
        advantage: of the response.
        token_weight: weight of each response token in the minibatch's loss.
    """

    token_ids: npt.NDArray[np.int32]
    prompt_tokens: int
    engine_log_probs: npt.NDArray[np.float32]
    reward: float
    advantage: float
    token_weight: float


@dataclass
class Microbatch:
    """Packed sequences, this context-parallel rank's tokens of them.

    Position t predicts `targets[t]`, the next token of its sequence. Fields over tokens are `[tokens / CP]`.

    Attributes:
        token_ids, position_ids, targets: int64.
        weights: fp32, of the token in the minibatch's loss; 0 where the target is no response token.
        rewards, advantages, engine_log_probs: fp32, of the predicted token.
        lengths: padded length of each sequence, over all CP ranks.
        old_log_probs: fp32, under the policy that starts the step; None: the policy has not moved yet.
        reference: what the reference's pass left on the last stage: final hidden states, or log-probs.
    """

    token_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    weights: Tensor
    rewards: Tensor
    advantages: Tensor
    engine_log_probs: Tensor
    lengths: list[int]
    old_log_probs: Tensor | None = None
    reference: Tensor | None = field(default=None, repr=False)

    @property
    def is_response(self) -> Tensor:
        """`[tokens / CP]` bool: whether a response token is predicted."""
        return self.weights > 0


def padded_length(tokens: int, multiple: int) -> int:
    """`tokens` rounded up to a multiple."""
    return -(-tokens // multiple) * multiple


def plan_microbatches(
    lengths: Sequence[int], *, replicas: int, token_budget: int, count_multiple: int = 1
) -> list[list[list[int]]]:
    """Which sequences go into which microbatch of which replica.

    Sequences are spread so that replicas hold about the same number of tokens (longest first, to the least
    loaded), then packed first-fit. All replicas get the same number of microbatches, so that their pipelines
    and collectives stay in step; where sequences are too few, some microbatches are empty. The plan is a
    pure function of its arguments: every rank makes it for itself.

    Args:
        lengths: padded length of each sequence, each at most `token_budget`.
        replicas: data-parallel size.
        token_budget: tokens of a microbatch.
        count_multiple: the number of microbatches is a multiple of this (PP under the interleaved schedule).

    Returns:
        `[replica][microbatch]`, indices into `lengths`.
    """
    loads = [(0, replica) for replica in range(replicas)]
    shares: list[list[int]] = [[] for _ in range(replicas)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, replica = heapq.heappop(loads)
        shares[replica].append(index)
        heapq.heappush(loads, (load + lengths[index], replica))
    packed = [_first_fit(share, lengths, token_budget) for share in shares]
    count = padded_length(max(1, *(len(bins) for bins in packed)), count_multiple)
    return [_spread(bins, count) for bins in packed]


def _first_fit(share: Sequence[int], lengths: Sequence[int], token_budget: int) -> list[list[int]]:
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


def _spread(bins: list[list[int]], count: int) -> list[list[int]]:
    """Splits the fullest bins until there are `count`; what cannot be split is filled up with empty ones."""
    bins = [list(b) for b in bins]
    while len(bins) < count:
        fullest = max(range(len(bins)), key=lambda b: len(bins[b]), default=None)
        if fullest is None or len(bins[fullest]) < 2:
            bins.append([])
        else:
            half = len(bins[fullest]) // 2
            bins.append(bins[fullest][half:])
            bins[fullest] = bins[fullest][:half]
    return bins


def pack(
    samples: Sequence[Sample],
    *,
    sequence_multiple: int,
    context_rank: int = 0,
    context_ranks: int = 1,
    device: torch.device | None = None,
) -> Microbatch:
    """Packs samples into one microbatch; none at all make a microbatch of padding.

    Args:
        samples: the sequences, in order.
        sequence_multiple: each is padded to a multiple of this.
        context_rank, context_ranks: whose tokens to keep.
        device: where the tensors go.
    """
    lengths = [padded_length(len(s.token_ids), sequence_multiple) for s in samples]
    lengths = lengths or [padded_length(1, sequence_multiple)]
    total = sum(lengths)
    integers = {name: np.zeros(total, np.int64) for name in ("token_ids", "position_ids", "targets")}
    floats = {
        name: np.zeros(total, np.float32) for name in ("weights", "rewards", "advantages", "engine_log_probs")
    }
    start = 0
    for sample, length in zip(samples, lengths, strict=False):
        tokens = len(sample.token_ids)
        integers["token_ids"][start : start + tokens] = sample.token_ids
        integers["targets"][start : start + tokens - 1] = sample.token_ids[1:]
        integers["position_ids"][start : start + length] = np.arange(length)
        response = slice(start + sample.prompt_tokens - 1, start + tokens - 1)
        floats["weights"][response] = sample.token_weight
        floats["rewards"][response] = sample.reward
        floats["advantages"][response] = sample.advantage
        floats["engine_log_probs"][response] = sample.engine_log_probs
        start += length
    mine = rank_major_order(lengths, context_ranks)[context_rank].numpy()
    tensors = {name: torch.from_numpy(array[mine]).to(device) for name, array in (integers | floats).items()}
    return Microbatch(lengths=lengths, **tensors)
