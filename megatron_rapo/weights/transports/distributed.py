"""Weights by broadcast: NCCL between GPUs, gloo between hosts. For engines on devices of their own."""

from __future__ import annotations

import time
from concurrent.futures import Future

import torch.distributed as dist
from torch import Tensor

from megatron_rapo.errors import EngineLost
from megatron_rapo.weights.buckets import Bucket
from megatron_rapo.weights.engines import Engines
from megatron_rapo.weights.stream import Wait, WeightStream
from megatron_rapo.weights.transports.bucketed import TIMEOUT_S, BucketTransport, Send
from megatron_rapo.weights.transports.group import Invitation, collect_lost_groups, join

POLL_S = 0.001


class DistributedTransport(BucketTransport):
    """Each bucket goes in one broadcast to all ranks of all engines."""

    def __init__(self, stream: WeightStream) -> None:
        super().__init__(stream)
        self._invitation: Invitation | None = None
        self._group: dist.ProcessGroup | None = None

    def _prepare(self, engines: Engines) -> Send:
        if self._group is None:
            collect_lost_groups()
        engines.begin_update()
        group = self._join(engines)
        assert self._invitation is not None
        name, count = self._invitation.meeting.name, len(self._invitation.urls)

        def send(bucket: Bucket, flat: Tensor, version: int | None) -> Wait:
            layout = bucket.layout
            answers = engines.each(
                lambda engine, _: engine.receive_bucket(layout, name, version, timeout=TIMEOUT_S),
                range(count),
            )
            work = group.broadcast(flat, 0)
            return lambda: _finish(answers, work)

        return send

    def _join(self, engines: Engines) -> dist.ProcessGroup:
        """The group with the engines that are live now."""
        if self._group is None or self._invitation is None or not self._invitation.holds_for(engines):
            self._discard()
            self._invitation = Invitation(engines, trainer_ranks=1)
            self._group = join(self._invitation.meeting, rank=0)
            self._invitation.accepted()
        return self._group

    def _discard(self) -> None:
        """An engine that is gone, or waits in a broadcast, has spoilt the group."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = self._invitation = None


def _finish(answers: Future[list[None]], work: dist.Work) -> None:
    """Waits for both. Without the engines' consent the broadcast may never end: their answers go first."""
    deadline = time.monotonic() + TIMEOUT_S
    while not work.is_completed() and time.monotonic() < deadline:
        if answers.done():
            answers.result()
        time.sleep(POLL_S)
    try:
        work.wait()
    except RuntimeError as error:
        answers.result()  # the engine's own reason says more
        raise EngineLost(f"a broadcast of weights failed: {error}") from error
    answers.result()
