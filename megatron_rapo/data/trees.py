"""Sequences that begin alike as trees: what several begin with is one segment of rows, computed once.

A segment's rows attend to the rows of the segments before it on its path, and to their own. Positions go on
along a path. So each sequence is computed as if it stood apart, and the last row of a segment predicts the
next token of every sequence that goes on from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_rapo.data.batching import (
    Microbatch,
    Plan,
    Sample,
    Tree,
    of_places,
    padded_length,
    padding,
    plan_microbatches,
)
from megatron_rapo.episode.beginnings import Beginning
from megatron_rapo.episode.group import Group

# A segment by the beginnings that lead to it: the same only where all of these are.
_Path = tuple[Beginning, ...]


def segment_sizes(groups: Iterable[Group]) -> tuple[list[int], list[int]]:
    """Rows of each segment of groups that are a tree each, and how many rows these attend to."""
    lengths: list[int] = []
    attended: list[int] = []
    for group in groups:
        found: set[_Path] = set()
        sizes = [len(sequence) for one in group.episodes for sequence in one.episode.sequences]
        for size, own in zip(sizes, chain.from_iterable(group.beginnings()), strict=True):
            end = 0
            for path, start, end in _segments(own):
                if path not in found:
                    found.add(path)
                    lengths.append(end - start)
                    attended.append(end)
            lengths.append(size - end)
            attended.append(size)
    return lengths, attended


def count_rows(samples: Iterable[Sample]) -> int:
    """Rows of samples that are in one microbatch."""
    found: set[_Path] = set()
    return sum(_further_rows(sample, found) for sample in samples)


def plan_trees(
    samples: Sequence[Sample], *, replicas: int, token_budget: int, count_multiple: int = 1
) -> Plan:
    """As `plan_microbatches`, but sequences that begin alike go together, and what they share counts once.

    A tree is cut where it is beyond the budget, or where replicas would be left with less than others: into
    as many parts as make the fullest replica emptiest. Each part repeats what it shares with another one.

    Args:
        samples: of a minibatch; they may be brief.
        replicas, token_budget, count_multiple: as of `plan_microbatches`.
    """
    trees: dict[_Path, list[int]] = {}
    # Sorted by their paths, so that what shares most is next to each other.
    for number in sorted(range(len(samples)), key=lambda n: samples[n].beginnings):
        first = samples[number].beginnings[:1]
        trees.setdefault(first or ((number, -1),), []).append(number)
    largest = max(map(len, trees.values()), default=1)
    found: list[tuple[int, int, Plan]] = []
    for parts in (2**power for power in range(largest.bit_length() + 1 if replicas > 1 else 1)):
        bundles = [part for tree in trees.values() for part in _cut(tree, samples, parts, token_budget)]
        lengths = [count_rows(samples[number] for number in bundle) for bundle in bundles]
        plan = plan_microbatches(
            lengths, replicas=replicas, token_budget=token_budget, count_multiple=count_multiple
        )
        fullest = max(sum(lengths[n] for part in share for n in part) for share in plan)
        whole = [[[n for bundle in part for n in bundles[bundle]] for part in share] for share in plan]
        found.append((fullest, len(plan[0]), whole))
    return min(found, key=lambda each: each[:2])[2]


def pack_trees(
    samples: Sequence[Sample],
    *,
    multiple: int,
    total_tokens: int | None = None,
    mark_names: Iterable[str] = (),
    device: torch.device | None = None,
) -> Microbatch:
    """As `pack`, with what samples begin with alike once.

    Args:
        samples: the sequences.
        multiple: rows are padded to a multiple of this, by a segment of padding.
        total_tokens, mark_names, device: as of `pack`.

    Raises:
        ValueError: samples that should begin alike do not.
    """
    rows = _Rows()
    needed = Counter(path for sample in samples for path, _, _ in _segments(sample.beginnings))
    sources, targets = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for sample in samples:
        chosen = np.flatnonzero(sample.sequence.trained)
        sources.append(rows.of(sample, needed)[chosen - 1])
        targets.append(sample.sequence.token_ids[chosen].astype(np.int64))
    ends = np.cumsum([len(own) for own in targets])
    predicting = [np.arange(*pair) for pair in pairwise(ends)]
    total = padded_length(max(rows.count, total_tokens or 0), multiple)
    for length in padding(rows.lengths, total, multiple):
        rows.add(np.zeros(length, np.int64), 0, np.zeros(0, np.int64))
    places, marks = of_places(samples, predicting, int(ends[-1]), mark_names)
    fields: dict[str, npt.NDArray[Any]] = {
        **places,
        "token_ids": np.concatenate(rows.token_ids),
        "position_ids": np.concatenate(rows.position_ids),
        "sequences": np.repeat(np.arange(len(samples)), [len(own) for own in predicting]),
        "targets": np.concatenate(targets),
        "sources": np.concatenate(sources),
    }
    tensors: dict[str, Any] = {name: torch.from_numpy(values).to(device) for name, values in fields.items()}
    return Microbatch(
        lengths=rows.lengths,
        marks={name: torch.from_numpy(values).to(device) for name, values in marks.items()},
        tree=Tree(
            keys=torch.from_numpy(np.concatenate(rows.keys)).to(device),
            key_lengths=[len(keys) for keys in rows.keys],
            sequences=len(samples),
        ),
        **tensors,
    )


class _Rows:
    """Rows of a microbatch, segment by segment; each list has an entry a segment."""

    def __init__(self) -> None:
        self.token_ids: list[npt.NDArray[np.int64]] = []
        self.position_ids: list[npt.NDArray[np.int64]] = []
        self.keys: list[npt.NDArray[np.int64]] = []
        self.lengths: list[int] = []
        self.count = 0
        self._known: dict[_Path, tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]] = {}

    def add(self, ids: npt.NDArray[np.integer], position: int, before: npt.NDArray[np.int64]) -> None:
        """A segment that begins at a position, behind the rows of its path."""
        own = np.arange(self.count, self.count + len(ids))
        self.token_ids.append(ids.astype(np.int64))
        self.position_ids.append(np.arange(position, position + len(ids)))
        self.keys.append(np.concatenate([before, own]))
        self.lengths.append(len(ids))
        self.count += len(ids)

    def of(self, sample: Sample, needed: Counter[_Path]) -> npt.NDArray[np.int64]:
        """The row of each of a sample's tokens; those that it does not share are added.

        Args:
            sample: with its tokens.
            needed: how many samples go along each path: where all of them go on alike, nothing is cut.

        Raises:
            ValueError: it has other tokens than those that it should begin with.
        """
        ids, start = sample.sequence.token_ids, 0
        path = np.zeros(0, np.int64)
        shared = [(known, end) for known, _, end in _segments(sample.beginnings) if needed[known] > 1]
        for (known, end), (onward, _) in pairwise([*shared, ((), 0)]):
            if needed[known] == needed[onward]:
                continue
            if known not in self._known:
                self.add(ids[start:end], start, path)
                self._known[known] = self.keys[-1], ids[:end]
            (path, begins), start = self._known[known], end
            if not np.array_equal(begins, ids[:end]):
                raise ValueError(f"a sequence of {len(ids)} tokens does not begin as it says: {known}")
        if len(ids) > start:
            self.add(ids[start:], start, path)
            path = self.keys[-1]
        return path


def _cut(
    tree: Sequence[int], samples: Sequence[Sample], parts: int, token_budget: int
) -> Iterator[list[int]]:
    """The sequences of a tree in so many parts of neighbours, or more, each within the budget."""
    most = -(-len(tree) // parts)
    part: list[int] = []
    found: set[_Path] = set()
    rows = 0
    for number in tree:
        further = _further_rows(samples[number], found)
        if part and (len(part) == most or rows + further > token_budget):
            yield part
            part, found, rows = [], set(), 0
            further = _further_rows(samples[number], found)
        part.append(number)
        rows += further
    yield part


def _further_rows(sample: Sample, found: set[_Path]) -> int:
    """Rows that a sample adds to those whose segments are found, and its segments with them."""
    rows, end = 0, 0
    for path, start, end in _segments(sample.beginnings):
        if path not in found:
            found.add(path)
            rows += end - start
    return rows + len(sample.sequence) - end


def _segments(beginnings: tuple[Beginning, ...]) -> Iterator[tuple[_Path, int, int]]:
    """What a sequence may share: each a path, and where the segment begins and ends in the sequence."""
    start = 0
    for number, (end, _) in enumerate(beginnings, 1):
        yield beginnings[:number], start, end
        start = end
