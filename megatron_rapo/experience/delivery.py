"""Tokens from the ranks that sampled them to the ranks that train on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from megatron_rapo.data.batching import Plan, Sample, replicas_of
from megatron_rapo.episode.choices import Choices, ChoiceShape
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.experience.batch import Batch
from megatron_rapo.parallel.placement import Placement, replica_ranks

_OF_TOKENS = {
    "token_ids": np.int32,
    "sampled": np.bool_,
    "log_probs": np.float32,
    "versions": np.int32,
}


def with_tokens(
    minibatches: Sequence[Sequence[Sample]],
    plans: Sequence[Plan],
    batch: Batch,
    placement: Placement,
    choices: ChoiceShape | None = None,
) -> list[list[Sample]]:
    """Samples of which those that this replica trains on have their tokens; all ranks call it.

    Tokens go from the head that sampled them to those whose replicas train on them, and on to all ranks of
    these.

    Args:
        minibatches: of samples, together one of each sequence of the batch's groups, in order.
        plans: which replica trains on which, of each minibatch.
        batch: has the tokens where they were sampled.
        placement: this rank's.
        choices: of the experts that tokens have, of which each pipeline stage gets those of its layers; None:
            they have none.
    """
    sampled = batch.sampled
    places = {id(group): place for place, group in enumerate(sampled.groups)}
    sources: list[int] = []
    own: dict[int, TokenSequence] = {}
    for place in [places[id(group)] for group in batch.groups]:
        if place in sampled.whole:
            own.update(enumerate(_sequences(sampled.whole[place]), len(sources)))
        sources += [sampled.heads[place]] * len(_sequences(sampled.groups[place]))
    takers = [replica for plan in plans for replica in replicas_of(plan)]
    lengths = [len(sample.sequence) for minibatch in minibatches for sample in minibatch]
    found = _delivered(own, lengths, sources, takers, placement, choices)
    numbers = iter(range(len(lengths)))
    return [
        [replace(sample, sequence=found.get(next(numbers), sample.sequence)) for sample in minibatch]
        for minibatch in minibatches
    ]


def _sequences(group: Group) -> list[Any]:
    return list(chain.from_iterable(one.episode.sequences for one in group.episodes))


def _delivered(
    own: Mapping[int, TokenSequence],
    lengths: Sequence[int],
    sources: Sequence[int],
    takers: Sequence[int],
    placement: Placement,
    choices: ChoiceShape | None,
) -> dict[int, TokenSequence]:
    """The sequences that this replica takes, by number.

    Args:
        own: those that this head has, by number.
        lengths, sources, takers: tokens of each; the replica whose head has it, and the one that takes it.
        placement: this rank's.
        choices: of the experts that they have, if they have some.
    """
    routes: dict[tuple[int, int], list[int]] = {}
    for number, route in enumerate(zip(sources, takers, strict=True)):
        routes.setdefault(route, []).append(number)
    # In order of their sources, so that what comes from one of them is in one piece.
    taken = [n for s in range(len(placement.heads)) for n in routes.get((s, placement.data_rank), [])]
    starts = [0, *accumulate(lengths[number] for number in taken)]
    fields: dict[str, npt.NDArray[Any]] = {
        name: np.empty(starts[-1], kind) for name, kind in _OF_TOKENS.items()
    }
    for name, values in fields.items():
        if placement.is_head:
            parts = {n: getattr(sequence, name) for n, sequence in own.items()}
            _exchange(values, parts, routes, lengths, placement)
        head = placement.heads[placement.data_rank]
        dist.broadcast(_bytes(values), src=head, group=placement.replica_group)
    if choices is not None:
        whole = choices.untold(starts[-1] if placement.is_head else 0)
        if placement.is_head:
            told = {n: choices.untold(lengths[n]) if s.experts is None else s.experts for n, s in own.items()}
            _exchange(whole, told, routes, lengths, placement)
        fields["experts"] = _of_own_layers(whole, starts[-1], choices, placement)
    pieces = zip(taken, pairwise(starts), strict=True)
    return {
        number: TokenSequence(**{name: values[start:end] for name, values in fields.items()})
        for number, (start, end) in pieces
    }


def _of_own_layers(whole: Choices, tokens: int, shape: ChoiceShape, placement: Placement) -> Choices:
    """`[tokens, layers of this stage, chosen]`, from the head's `[tokens, layers, chosen]`."""
    layout = placement.layout
    own = np.empty((tokens, len(placement.layers_of(shape.layers)), shape.chosen), shape.dtype)
    head, *others = replica_ranks(layout, placement.data_rank)
    waiting: list[Any] = []
    if tokens and placement.rank != head:
        waiting.append(dist.irecv(_bytes(own), head, group=placement.host_group))
    elif tokens:
        block = layout.tensor_parallel * layout.context_parallel  # ranks of a stage
        parts = [
            np.ascontiguousarray(whole[:, placement.layers_of(shape.layers, stage)])
            for stage in range(layout.pipeline_parallel)
        ]
        own[:] = parts[0]
        for place, rank in enumerate(others, 1):
            waiting.append(dist.isend(_bytes(parts[place // block]), rank, group=placement.host_group))
    for work in waiting:
        work.wait()
    return own


def _exchange(
    values: npt.NDArray[Any],
    parts: Mapping[int, npt.NDArray[Any]],
    routes: Mapping[tuple[int, int], Sequence[int]],
    lengths: Sequence[int],
    placement: Placement,
) -> None:
    """Fills `values` with what this head takes, by source; sends others what they take. All heads call it."""
    mine, group = placement.data_rank, placement.host_group

    def joined(route: tuple[int, int]) -> npt.NDArray[Any]:
        """Of one type, whatever an environment of the user's own has given it."""
        return np.concatenate([parts[number] for number in routes[route]], dtype=values.dtype)

    waiting: list[Any] = []
    start = 0
    for source, rank in enumerate(placement.heads):
        numbers = routes.get((source, mine), [])
        piece = values[start : start + sum(lengths[number] for number in numbers)]
        start += len(piece)
        if source == mine and numbers:
            piece[:] = joined((mine, mine))
        elif numbers:
            waiting.append(dist.irecv(_bytes(piece), rank, group=group))
    for taker, rank in enumerate(placement.heads):
        if taker != mine and (mine, taker) in routes:
            waiting.append(dist.isend(_bytes(joined((mine, taker))), rank, group=group))
    for work in waiting:
        work.wait()


def _bytes(values: npt.NDArray[Any]) -> torch.Tensor:
    """The array's memory: gloo takes no bools."""
    return torch.from_numpy(values.view(np.uint8))
