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

from megatron_rapo.episode.beginnings import Beginning
from megatron_rapo.episode.brief import BriefSequence
from megatron_rapo.episode.choices import ChoiceShape
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
        beginnings: what it begins with like others, to be computed once (`data/trees.py`); ascending.
    """

    sequence: TokenSequence | BriefSequence
    phi: float
    advantage: float | npt.NDArray[np.floating]
    token_weight: float | npt.NDArray[np.floating]
    has_probability: bool = True
    off_policy: bool = False
    marks: Mapping[str, float | npt.NDArray[np.floating]] = field(default_factory=dict)
    beginnings: tuple[Beginning, ...] = ()


@dataclass(frozen=True)
class Tree:
    """How segments attend, where sequences share what they begin with.

    Attributes:
        keys: int64 `[Σ key_lengths]`, the rows that each segment's rows attend to: those of the segments
            before it on its path, then its own. Its last row sees all of them, the one before it all but one…
        key_lengths: how many of them each segment has.
        sequences: how many sequences there are.
    """

    keys: Tensor
    key_lengths: list[int]
    sequences: int


@dataclass
class Microbatch:
    """Packed sequences, this context-parallel rank's tokens of them.

    The model sees rows, one a token: `token_ids` and `position_ids`. All else is of places, where a token is
    predicted. Without a tree they are the rows: row t predicts `targets[t]`, the next token of its sequence,
    and both are `[tokens / CP]`. With one, a row is of all sequences that begin with it, and places are the
    trained tokens of each sequence.

    Attributes:
        token_ids, position_ids: int64, of rows.
        targets: int64, the token that is predicted.
        weights: fp32, of the token in the minibatch's loss; 0 where it takes no part.
        phi, advantages, engine_log_probs: fp32, of the predicted token; log-probs are 0 of given ones.
        response_positions: int64, of the predicted token among its sequence's trained ones; −1 where it is
            none of them.
        sequences: int64, which of the packed sequences the place belongs to.
        off_policy: bool, whether the predicted token's log-prob is of another distribution than the policy's.
        marks: fp32, the method's numbers of the predicted token by name.
        lengths: padded length of each sequence, over all CP ranks; with a tree, of each segment.
        tree: how segments attend; None: each is a sequence of its own.
        sources: int64, the row by which each place is predicted; None: the place's own.
        old_log_probs: fp32, under the policy that starts the step; None: the policy has not moved yet.
        old_entropies: fp32, of its distributions; None where no method asks for them.
        tempered_log_probs: fp32, as old_log_probs at another temperature; None where no method asks.
        reference_hidden: `[tokens / CP (/ TP under sequence parallelism), hidden]`, the reference's final
            hidden states of rows, from which its head makes logits.
        teacher_hidden: of the teacher, likewise; its own hidden size.
        reference_log_probs, flattened_log_probs: `[response tokens]` fp32, under the reference as it is, and
            flattened by φ.
        experts: of rows in each of this rank's layers, by its number from 1: `[rows / CP (/ TP under sequence
            parallelism), experts of a token]` uint8 or uint16; None: routers choose.
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
    tree: Tree | None = None
    sources: Tensor | None = None
    old_log_probs: Tensor | None = None
    old_entropies: Tensor | None = None
    tempered_log_probs: Tensor | None = None
    reference_hidden: Tensor | None = None
    teacher_hidden: Tensor | None = None
    reference_log_probs: Tensor | None = None
    flattened_log_probs: Tensor | None = None
    experts: dict[int, Tensor] | None = None

    @property
    def is_response(self) -> Tensor:
        """`[places]` bool: whether a trained token is predicted, be it masked out of the loss."""
        return self.response_positions >= 0

    @property
    def sequence_count(self) -> int:
        """How many sequences places may belong to, the same on all CP ranks."""
        return len(self.lengths) if self.tree is None else self.tree.sequences

    def at_places(self, hidden: Tensor) -> Tensor:
        """`[places, hidden]`, of hidden states of rows: those that predict."""
        return hidden if self.sources is None else hidden[self.sources]

    def at_responses(self, hidden: Tensor) -> Tensor:
        """`[response tokens, hidden]`, likewise."""
        chosen = self.is_response
        return hidden[chosen if self.sources is None else self.sources[chosen]]


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


@dataclass(frozen=True)
class OwnChoices:
    """Which of the samples' choices of experts a rank's microbatches have.

    Attributes:
        shape: of all layers' choices.
        layers: of this rank, numbers from 0; samples have those of these alone.
        tensor_rank, tensor_ranks: whose part of the rows, which sequence parallelism cuts.
    """

    shape: ChoiceShape
    layers: Sequence[int]
    tensor_rank: int = 0
    tensor_ranks: int = 1

    def of(
        self, samples: Sequence[Sample], lengths: Sequence[int], mine: npt.NDArray[np.int64]
    ) -> dict[int, npt.NDArray[Any]]:
        """By number of the layer, from 1: `[rows, chosen]` of this rank's rows; unknown where nobody told.

        Args:
            samples: in order.
            lengths: padded, of all sequences.
            mine: this context-parallel rank's of the packed tokens.
        """
        shape = (sum(lengths), len(self.layers), self.shape.chosen)
        packed = np.full(shape, self.shape.unknown, self.shape.dtype)
        for sample, start in zip(samples, np.cumsum([0, *lengths]), strict=False):
            if (told := sample.sequence.experts) is not None:
                packed[start : start + len(told)] = told
        rows = packed[np.split(mine, self.tensor_ranks)[self.tensor_rank]]
        return {layer + 1: rows[:, place].copy() for place, layer in enumerate(self.layers)}


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
    choices: OwnChoices | None = None,
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
        choices: of the samples' experts, where their tokens are to go there again.
    """
    lengths = [padded_length(len(sample.sequence), sequence_multiple) for sample in samples]
    lengths += padding(lengths, total_tokens or 0, sequence_multiple)
    total = sum(lengths)
    token_ids, position_ids, targets = (np.zeros(total, np.int64) for _ in range(3))
    predicting = []
    start = 0
    for sample, length in zip(samples, lengths, strict=False):
        sequence = sample.sequence
        tokens = len(sequence)
        token_ids[start : start + tokens] = sequence.token_ids
        targets[start : start + tokens - 1] = sequence.token_ids[1:]
        position_ids[start : start + length] = np.arange(length)
        # A trained token is never its sequence's first.
        predicting.append(start + np.flatnonzero(sequence.trained) - 1)
        start += length
    places, marks = of_places(samples, predicting, total, mark_names)
    fields = {
        **places,
        "token_ids": token_ids,
        "position_ids": position_ids,
        "targets": targets,
        "sequences": np.repeat(np.arange(len(lengths)), lengths),
    }
    mine = rank_major_order(lengths, context_ranks)[context_rank].numpy()

    def of_this_rank(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
        return {name: torch.from_numpy(array[mine]).to(device) for name, array in arrays.items()}

    experts = None
    if choices is not None:
        told = choices.of(samples, lengths, mine)
        experts = {layer: torch.from_numpy(rows).to(device) for layer, rows in told.items()}
    return Microbatch(lengths=lengths, marks=of_this_rank(marks), experts=experts, **of_this_rank(fields))


def padding(lengths: Sequence[int], total: int, multiple: int) -> list[int]:
    """Lengths of sequences of padding, none longer than the others, up to `total` tokens, or `multiple`."""
    longest = max(lengths, default=multiple)
    missing = max(total, multiple) - sum(lengths)
    added = []
    while missing > 0:
        added.append(min(missing, longest))
        missing -= added[-1]
    return added


def of_places(
    samples: Sequence[Sample],
    predicting: Sequence[npt.NDArray[np.int64]],
    total: int,
    mark_names: Iterable[str],
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[np.float32]]]:
    """What a microbatch's places know of the trained tokens that they predict, by field; and its marks.

    Args:
        samples: in order.
        predicting: the places of each sample's trained tokens.
        total: how many places there are.
        mark_names: of the samples' marks.
    """
    response_positions = np.full(total, -1)
    floats = {name: np.zeros(total, np.float32) for name in _FLOATS}
    marks = {name: np.zeros(total, np.float32) for name in mark_names}
    off_policy = np.zeros(total, bool)
    for sample, places in zip(samples, predicting, strict=True):
        chosen = np.flatnonzero(sample.sequence.trained)
        if sample.has_probability:
            response_positions[places] = np.arange(len(chosen))
        floats["weights"][places] = sample.token_weight
        floats["phi"][places] = sample.phi
        floats["advantages"][places] = sample.advantage
        floats["engine_log_probs"][places] = np.nan_to_num(sample.sequence.log_probs[chosen])
        off_policy[places] = sample.off_policy
        for name, values in sample.marks.items():
            marks[name][places] = values
    return {**floats, "response_positions": response_positions, "off_policy": off_policy}, marks
