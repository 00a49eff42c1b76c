"""Each trainer rank's own shards, straight to the engine ranks that need them: no gathering, no relay."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.errors import EngineLost
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.engines import Engines
from megatron_rapo.weights.gather import StageWeights
from megatron_rapo.weights.plan import Plan, Transfer, make_plan
from megatron_rapo.weights.stream import SLOTS, attempt, device_memory
from megatron_rapo.weights.transports.bucketed import TIMEOUT_S
from megatron_rapo.weights.transports.distributed import DistributedTransport
from megatron_rapo.weights.transports.group import Invitation, collect_lost_groups, join
from megatron_rapo.wire.group import Meeting
from megatron_rapo.wire.slices import CHECKSUM_BYTES, SliceMessage, seal


@dataclass(frozen=True)
class Message:
    """Slices from one trainer rank to one engine rank, one behind the other, and their checksum."""

    source: int
    engine: int
    engine_rank: int
    transfers: tuple[Transfer, ...]

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the whole message."""
        return sum(transfer.elements for transfer in self.transfers) * dtype.itemsize + CHECKSUM_BYTES

    def told(self, sources: Sequence[int]) -> SliceMessage:
        """As the engine is told of it; `sources` are the sending ranks, in the group's order."""
        slices = tuple((t.tensor.name, t.tensor.cut, t.part.start, t.part.stop) for t in self.transfers)
        return SliceMessage(sources.index(self.source), self.engine_rank, slices)


def make_rounds(plan: Plan, dtype: torch.dtype, limit: int) -> list[list[Message]]:
    """The plan's transfers as messages of at most `limit` bytes (a larger slice goes alone), in rounds.

    In a round each trainer rank sends each engine rank one message at most.
    """
    routes: dict[tuple[int, int, int], list[Transfer]] = defaultdict(list)
    for transfer in plan.transfers:
        routes[transfer.source, transfer.engine, transfer.engine_rank].append(transfer)
    messages = [
        [Message(*route, part) for part in _parts(sent, dtype, limit)] for route, sent in routes.items()
    ]
    return [[m for m in together if m is not None] for together in zip_longest(*messages)]


def _parts(transfers: Sequence[Transfer], dtype: torch.dtype, limit: int) -> Iterator[tuple[Transfer, ...]]:
    pending: list[Transfer] = []
    size = 0
    for transfer in transfers:
        nbytes = transfer.elements * dtype.itemsize
        if pending and size + nbytes > limit:
            yield tuple(pending)
            pending, size = [], 0
        pending.append(transfer)
        size += nbytes
    if pending:
        yield tuple(pending)


class ShardTransport:
    """Point to point over one group of all sending ranks and all engine ranks.

    The embedded server takes slices; to engines that take whole tensors only, as SGLang does, `fallback`
    sends.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: StageWeights,
        placement: Placement,
        dtype: torch.dtype,
        fallback: DistributedTransport,
        *,
        vocabulary_multiple: int,
        bucket_bytes: int,
    ) -> None:
        self._architecture = architecture
        self._weights = weights
        self._placement = placement
        self._dtype = dtype
        self._fallback = fallback
        self._vocabulary_multiple = vocabulary_multiple
        self._message_bytes = bucket_bytes // SLOTS
        self._invitation: Invitation | None = None
        self._meeting: Meeting | None = None
        self._group: dist.ProcessGroup | None = None
        self._buffers: dict[int, Tensor] = {}  # by slot; kept for the next publication

    def send(self, engines: Engines | None, version: int) -> Mapping[str, int]:
        """Sends the weights as `version`. All ranks call it; `engines` is the main rank's.

        Returns:
            The checksum of each message to the first engine; on all ranks.

        Raises:
            EngineLost, RapoError: on the main rank.
        """
        place = self._placement
        if self._group is None:
            collect_lost_groups()
        sizes, failure = attempt(partial(_open, engines) if engines is not None else None)
        sizes = place.share_from_main(sizes)
        if sizes == []:
            return self._fallback.send(engines, version)
        if sizes is None:
            if failure is not None:
                raise failure
            return {}
        plan = make_plan(self._architecture, place.layout, sizes, self._vocabulary_multiple)
        rounds = make_rounds(plan, self._dtype, self._message_bytes)
        sources = sorted({transfer.source for transfer in plan.transfers})
        checksums, failure = attempt(lambda: self._run(engines, rounds, sources, version))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (checksums, failure), group=place.host_group)
        failures = [error for _, error in everyone if error is not None]
        if failures:
            self._discard()
            if engines is not None:
                # The main rank heard the engine itself.
                raise failure or failures[0]
            return {}
        if engines is not None:
            engines.end_update(version)
        return {name: value for part, _ in everyone for name, value in part.items()}

    def _run(
        self, engines: Engines | None, rounds: list[list[Message]], sources: list[int], version: int
    ) -> dict[str, int]:
        self._join(engines, sources)
        assert self._meeting is not None
        mine = [m for messages in rounds for m in messages if m.source == self._placement.rank]
        sender = _Sender(mine, self._weights, self._group, self._meeting, self._dtype, self._buffers)
        checksums: dict[str, int] = {}
        answer: Future[list[None]] | None = None
        for number, messages in enumerate(rounds):
            sender.pack()  # while the engines take the round before
            if engines is not None:
                if answer is not None:  # one request at a time: two could reach an engine in the other order
                    answer.result()
                named = version if number == len(rounds) - 1 else None
                answer = self._receive(engines, messages, sources, named)
            for message in messages:
                if message.source == self._placement.rank:
                    value = sender.send()
                    if message.engine == 0:
                        checksums[f"{message.source} to {message.engine_rank}, {number}"] = value
        sender.finish()
        self._weights.forget()
        if answer is not None:
            answer.result()
        return checksums

    def _discard(self) -> None:
        """An engine that is gone, or waits for a message, has spoilt the group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = self._meeting = self._invitation = None

    def _join(self, engines: Engines | None, sources: list[int]) -> None:
        """The group with the engines that are live now. All ranks call it; those that send join."""
        stale = engines is not None and (self._invitation is None or not self._invitation.holds_for(engines))
        if not self._placement.share_from_main(stale):
            return
        self._discard()
        invitation, failure = attempt(
            partial(Invitation, engines, len(sources)) if engines is not None else None
        )
        self._invitation = invitation
        self._meeting = self._placement.share_from_main(invitation.meeting if invitation else None)
        if self._meeting is None:
            raise failure or EngineLost("the engines did not join")
        if self._placement.rank in sources:
            self._group = join(self._meeting, sources.index(self._placement.rank))
        if self._invitation is not None:
            self._invitation.accepted()

    def _receive(
        self, engines: Engines, messages: list[Message], sources: list[int], version: int | None
    ) -> Future[list[None]]:
        """Has each engine receive its messages of a round."""
        assert self._meeting is not None
        group = self._meeting.name
        parts = [
            [message.told(sources) for message in messages if message.engine == engine]
            for engine in range(len(engines.urls))
        ]
        return engines.each(
            lambda engine, part: engine.receive_slices(part, group, self._dtype, version, timeout=TIMEOUT_S),
            parts,
        )


def _open(engines: Engines) -> list[int]:
    """Opens the engines' update and returns their sizes; nothing where one takes no slices."""
    if not engines.take_slices():
        return []
    engines.begin_update()
    return engines.tensor_parallel()


class _Sender:
    """This rank's messages, in order: one is packed while the one before is on its way."""

    def __init__(
        self,
        messages: Sequence[Message],
        weights: StageWeights,
        group: dist.ProcessGroup | None,
        meeting: Meeting,
        dtype: torch.dtype,
        buffers: dict[int, Tensor],
    ) -> None:
        self._waiting = deque(enumerate(messages))
        self._sizes = [message.nbytes(dtype) for message in messages]
        self._weights = weights
        self._group = group
        self._meeting = meeting
        self._dtype = dtype
        self._buffers = buffers
        self._packed: tuple[Message, Tensor, int] | None = None
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    def pack(self) -> None:
        """Lays out the next message, unless it is already, or there is none."""
        if self._packed is not None or not self._waiting:
            return
        number, message = self._waiting.popleft()
        while len(self._under_way) >= SLOTS:
            _finish(*self._under_way.popleft())
        flat = self._buffer(number % SLOTS)[: self._sizes[number]]
        values, start = flat[:-CHECKSUM_BYTES].view(self._dtype), 0
        for transfer in message.transfers:
            part = self._weights.local_part(transfer)
            values[start : start + transfer.elements].view(part.shape).copy_(part)
            start += transfer.elements
        self._packed = message, flat, seal(flat, self._dtype)

    def send(self) -> int:
        """Begins to send the next message; returns its checksum."""
        self.pack()
        assert self._packed is not None and self._group is not None
        message, flat, checksum = self._packed
        self._packed = None
        to = self._meeting.first_ranks[message.engine] + message.engine_rank
        self._under_way.append((self._group.send([flat], to, 0), flat))
        return checksum

    def finish(self) -> None:
        """Waits until everything has been taken."""
        while self._under_way:
            _finish(*self._under_way.popleft())

    def _buffer(self, slot: int) -> Tensor:
        """The slot's bytes, which are as many as its largest message has."""
        nbytes = max(self._sizes[slot::SLOTS])
        if slot not in self._buffers or len(self._buffers[slot]) < nbytes:
            self._buffers[slot] = device_memory(nbytes)
        return self._buffers[slot]


def _finish(work: dist.Work, flat: Tensor) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise EngineLost(f"a message of {flat.nbytes} bytes of weights was not taken: {error}") from error
