"""The process group of trainer ranks and all ranks of the engines, over which weights travel."""

from __future__ import annotations

import gc
import itertools
import os
import socket
from collections.abc import Sequence
from concurrent.futures import wait
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

from megatron_rapo.errors import EngineLost
from megatron_rapo.parallel.device import device
from megatron_rapo.weights.engines import Engines
from megatron_rapo.wire.group import Meeting, new_group
from megatron_rapo.wire.patience import TIMEOUT_S

REFUSAL_WAIT_S = 0.5  # an engine that refuses to join says so at once; one that joins answers when all have
_numbers = itertools.count()


class Invitation:
    """The main rank's side: it serves the meeting's store, and has asked the engines to come."""

    def __init__(self, engines: Engines, trainer_ranks: int) -> None:
        """
        Raises:
            EngineLost, RapoError: an engine is gone, or refuses at once.
        """
        self.urls = list(engines.urls)
        self._membership = engines.membership
        address = _address_towards(self.urls)
        sizes = tuple(engines.tensor_parallel())
        with socket.create_server((address, 0)) as listener:
            self.meeting = Meeting(
                address,
                listener.getsockname()[1],
                f"weights-{os.getpid()}-{next(_numbers)}",
                "nccl" if device().type == "cuda" else "gloo",
                trainer_ranks,
                sizes,
            )
            self._store = dist.TCPStore(
                address,
                self.meeting.port,
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=TIMEOUT_S),
                master_listen_fd=os.dup(listener.fileno()),
            )
        self._joined = engines.each(
            lambda engine, first: engine.join_group(self.meeting, first, timeout=TIMEOUT_S),
            self.meeting.first_ranks,
        )
        if wait([self._joined], REFUSAL_WAIT_S).done:
            self._joined.result()  # raises: nobody can have joined without this process

    def holds_for(self, engines: Engines) -> bool:
        """Whether those that were asked are the live engines still."""
        return self._membership == engines.membership

    def accepted(self) -> None:
        """Waits until all engines have joined; this process and the other trainer ranks must have.

        Raises:
            EngineLost, RapoError: one has not.
        """
        self._joined.result()


def join(meeting: Meeting, rank: int) -> dist.ProcessGroup:
    """Joins as the trainer's rank `rank`.

    Raises:
        EngineLost: not everyone came in time.
    """
    timeout = timedelta(seconds=TIMEOUT_S)
    try:
        store = dist.TCPStore(meeting.address, meeting.port, is_master=False, timeout=timeout)
        return new_group(store, rank, meeting.size, meeting.name, meeting.backend, timeout)
    except RuntimeError as error:  # torch's errors of store and backend are of this kind
        raise EngineLost(f"no process group with the engines: {error}") from error


def collect_lost_groups() -> None:
    """Frees groups that failed: only then do their sockets close, and engines that wait in them get out."""
    gc.collect()  # the failures' tracebacks refer to them in circles


def _address_towards(urls: Sequence[str]) -> str:
    """This machine's address as the engines see it."""
    parts = urlsplit(urls[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))  # sends nothing
        return str(probe.getsockname()[0])
