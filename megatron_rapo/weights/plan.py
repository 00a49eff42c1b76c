"""The resharding plan: which trainer rank sends which slice of which tensor to which rank of which engine.

A HF tensor, or each of its sections, is cut on either side into contiguous slices of one and the same
dimension (`parameter_map`). So a plan is the intersection of two cuts of an interval, for each tensor:
arithmetic on the architecture and the layouts, made once, without a model or a process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rapo.config import Parallel
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.weights.tensor_table import HFTensor, tensor_table

ENGINE_VOCABULARY_MULTIPLE = 64  # SGLang pads the rows of embedding and head to this before it cuts them


@dataclass(frozen=True)
class Slice:
    """`start:stop` of a tensor's cut dimension, in the HF tensor's own rows or columns."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def common(self, other: Slice) -> Slice:
        """What both hold; its length is 0 where they hold nothing in common."""
        return Slice(max(self.start, other.start), min(self.stop, other.stop))


@dataclass(frozen=True)
class Transfer:
    """One contiguous slice of one tensor, from one trainer rank to one rank of one engine.

    Attributes:
        tensor: what it is a slice of.
        part: which slice of the tensor's cut dimension (0:1 for a tensor that is not cut).
        source: the trainer's global rank.
        engine, engine_rank: the engine's number and its tensor-parallel rank.
    """

    tensor: HFTensor
    part: Slice
    source: int
    engine: int
    engine_rank: int

    @property
    def elements(self) -> int:
        """How many numbers are sent."""
        cut = self.tensor.cut
        return (
            self.tensor.elements
            if cut is None
            else self.tensor.elements // self.tensor.shape[cut] * len(self.part)
        )


@dataclass(frozen=True)
class Plan:
    """All transfers of one publication, by tensor in the order of `tensor_table`."""

    transfers: tuple[Transfer, ...]

    def elements_by_source(self) -> Counter[int]:
        """What each trainer rank sends."""
        sent: Counter[int] = Counter()
        for transfer in self.transfers:
            sent[transfer.source] += transfer.elements
        return sent

    def describe(self, bytes_per_element: int) -> str:
        """A line a sender and receiver, for people."""
        volume: Counter[tuple[int, int, int]] = Counter()
        pieces: Counter[tuple[int, int, int]] = Counter()
        for transfer in self.transfers:
            route = (transfer.source, transfer.engine, transfer.engine_rank)
            volume[route] += transfer.elements * bytes_per_element
            pieces[route] += 1
        return "\n".join(
            f"trainer rank {source} → engine {engine} rank {rank}: {pieces[source, engine, rank]} slices, "
            f"{size / 2**20:,.1f} MiB"
            for (source, engine, rank), size in sorted(volume.items())
        )


def make_plan(
    architecture: Architecture,
    layout: Parallel,
    engines: Sequence[int],
    vocabulary_multiple: int = 1,
) -> Plan:
    """The plan from a trainer's layout to engines of the given tensor-parallel sizes.

    Each engine is served by one copy of a tensor, engines by different copies in turn; a tensor that all
    holders have whole goes to an engine's ranks from different ones.
    """
    rows = architecture.padded_vocabulary(vocabulary_multiple, layout.tensor_parallel)
    tensors = tensor_table(architecture, layout)
    return Plan(
        tuple(
            transfer
            for engine, size in enumerate(engines)
            for tensor in tensors
            for transfer in _transfers(tensor, rows, size, engine)
        )
    )


def _transfers(tensor: HFTensor, rows: int, engine_ranks: int, engine: int) -> Iterator[Transfer]:
    """Of one tensor to one engine; `rows` are the trainer's, padded, of embedding and head."""
    copies = tensor.holders.copies
    ranks = copies[engine % len(copies)]
    held = _trainer_slices(tensor, rows, len(ranks))
    for engine_rank, needed in enumerate(_engine_slices(tensor, engine_ranks)):
        if tensor.cut is None:
            yield Transfer(tensor, needed, ranks[engine_rank % len(ranks)], engine, engine_rank)
            continue
        section = tensor.shape[tensor.cut] // tensor.sections
        for start in range(0, section * tensor.sections, section):
            for source, holding in zip(ranks, held, strict=True):
                if part := holding.common(needed):
                    part = Slice(start + part.start, start + part.stop)
                    yield Transfer(tensor, part, source, engine, engine_rank)


def _trainer_slices(tensor: HFTensor, rows: int, ranks: int) -> list[Slice]:
    """What each rank of a copy holds of a tensor, or of each of its sections, padding left out."""
    if tensor.cut is None:
        return [Slice(0, 1)] * ranks
    size = tensor.shape[tensor.cut] // tensor.sections
    return _equal_slices(size, (rows if tensor.vocabulary else size) // ranks, ranks)


def _engine_slices(tensor: HFTensor, ranks: int) -> list[Slice]:
    """What each rank of an engine needs of a tensor, or of each of its sections: SGLang's cuts, under its own
    tensor parallelism.
    """
    if tensor.cut is None:
        return [Slice(0, 1)] * ranks
    size, unit = tensor.shape[tensor.cut] // tensor.sections, tensor.unit
    if tensor.whole_in_engines:
        return [Slice(0, size)] * ranks
    if tensor.vocabulary:
        padded = -(-size // ENGINE_VOCABULARY_MULTIPLE) * ENGINE_VOCABULARY_MULTIPLE
        return _equal_slices(size, -(-padded // ranks), ranks)
    if ranks <= size // unit:
        return _equal_slices(size, size // ranks, ranks)
    # More ranks than heads of keys and values: several hold the same one.
    heads = [rank * (size // unit) // ranks for rank in range(ranks)]
    return [Slice(head * unit, (head + 1) * unit) for head in heads]


def _equal_slices(size: int, step: int, ranks: int) -> list[Slice]:
    return [Slice(min(rank * step, size), min((rank + 1) * step, size)) for rank in range(ranks)]
