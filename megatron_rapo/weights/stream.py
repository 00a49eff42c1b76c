"""All tensors of the model, in buckets to the main rank, while it passes earlier ones on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.errors import RapoError
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.buckets import Bucket, make_buckets
from megatron_rapo.weights.gather import StageWeights
from megatron_rapo.weights.tensor_table import HFTensor

T = TypeVar("T")
SLOTS = 2  # one is filled while the other is sent

Wait = Callable[[], None]
"""Returns once a bucket's memory may be used again, each time it is asked; raises what went wrong with it."""
Deliver = Callable[[Bucket, Tensor], Wait]
"""Begins to send a bucket, whose bytes are `[nbytes]` uint8."""
Open = Callable[[], Deliver]
"""Makes the engines ready to receive."""


def device_memory(nbytes: int) -> Tensor:
    """`[nbytes]` uint8 where this rank computes."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device())


class WeightStream:
    """Brings all tensors from their senders (`Holders`) to the main rank.

    A rank needs `bucket_bytes` beside its parameters, and one tensor. The main rank relays what others
    collect, so that one rank alone deals with the engines, and with their faults.

    Args:
        tensors: the model's (`tensor_table`), the same on all ranks.
        weights: of this rank.
        dtype: that the parameters have.
        bucket_bytes: of all buckets in flight; a larger tensor is sent alone.
        memory: makes the main rank's buffers; kept for the next publication.
    """

    def __init__(
        self,
        tensors: list[HFTensor],
        weights: StageWeights,
        placement: Placement,
        dtype: torch.dtype,
        bucket_bytes: int,
        memory: Callable[[int], Tensor] = device_memory,
    ) -> None:
        self._slot_bytes = bucket_bytes // SLOTS
        self.buckets = make_buckets(tensors, dtype, self._slot_bytes)
        self._weights = weights
        self._placement = placement
        self._memory = memory
        self._slots: dict[int, Tensor] = {}

    def run(self, open_engines: Open | None) -> None:
        """Streams all buckets once. All ranks call it; `open_engines` is the main rank's.

        Raises:
            RapoError: on the main rank, the first error of the engines. What the other ranks still send is
                taken and dropped, so that no rank is left waiting.
        """
        place = self._placement
        busy: list[Wait | None] = [None] * SLOTS
        deliver, failure = attempt(open_engines)
        for slot, bucket in self._numbered():
            failure = failure or attempt(busy[slot])[1]
            busy[slot] = None
            collects = place.is_main or place.rank == bucket.holders.collector
            flat = self._memory_of(slot, bucket) if collects else None
            self._fill(bucket, flat)
            if flat is None:
                continue
            if not place.is_main:
                busy[slot] = _send(flat)
            elif deliver is not None and failure is None:
                busy[slot], failure = attempt(partial(deliver, bucket, flat))
        for wait in busy:
            failure = failure or attempt(wait)[1]
        self._weights.forget()
        if failure is not None:
            raise failure

    def _numbered(self) -> list[tuple[int, Bucket]]:
        """The buckets that pass through this rank, each with its slot; those beyond the limit share one."""
        place = self._placement
        mine = [b for b in self.buckets if place.is_main or place.rank in b.holders.senders]
        return [(0 if b.nbytes > self._slot_bytes else i % SLOTS, b) for i, b in enumerate(mine)]

    def _memory_of(self, slot: int, bucket: Bucket) -> Tensor:
        """`[nbytes]` uint8 of the slot's buffer, which is made as large as its largest bucket."""
        if slot not in self._slots:
            largest = max(b.nbytes for number, b in self._numbered() if number == slot)
            make = self._memory if self._placement.is_main else device_memory
            self._slots[slot] = make(largest)
        return self._slots[slot][: bucket.nbytes]

    def _fill(self, bucket: Bucket, flat: Tensor | None) -> None:
        """Gathers a bucket that this rank holds slices of; the main rank receives what another collected."""
        rank, held_by = self._placement.rank, bucket.holders
        if rank == held_by.collector:
            assert flat is not None
            for tensor, view in bucket.views(flat):
                self._weights.gather(tensor, view)
            return
        if rank in held_by.senders:
            for tensor in bucket.tensors:
                self._weights.gather(tensor, None)
        if flat is not None:
            dist.recv(flat, src=held_by.collector)


def _send(flat: Tensor) -> Wait:
    work = dist.isend(flat, dst=0)
    assert work is not None

    def wait() -> None:
        work.wait()

    return wait


def attempt(call: Callable[[], T] | None) -> tuple[T | None, RapoError | None]:
    """What a call returns, or how it failed."""
    try:
        return call() if call is not None else None, None
    except RapoError as error:
        return None, error
