"""Process groups with a trainer, and the tensors that it broadcasts over them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rapo.errors import RapoError
from megatron_rapo.wire.bucket import TensorMetadata, views
from megatron_rapo.wire.group import new_group
from megatron_rapo.wire.patience import TIMEOUT_S


class UpdateGroups:
    """The groups that this process has joined, by name. In each the trainer's ranks are the first."""

    def __init__(self) -> None:
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._memory = torch.empty(0, dtype=torch.uint8)  # kept: fresh pages cost more than what fills them

    def join(self, name: str, address: str, port: int, rank: int, size: int, backend: str) -> None:
        """Joins a group that the trainer opens at `address`; returns once all are there.

        Raises:
            RapoError: the name is taken, or not everybody came in time.
        """
        if name in self._groups:
            raise RapoError(f"the group {name!r} exists already; destroy it first, or choose another name")
        host = f"[{address}]" if ":" in address else address
        try:
            timeout = timedelta(seconds=TIMEOUT_S)
            store, rank, size = next(dist.rendezvous(f"tcp://{host}:{port}", rank, size, timeout=timeout))
            store.set_timeout(timeout)
            self._groups[name] = new_group(store, rank, size, name, backend, timeout)
        except (RuntimeError, ValueError) as error:
            raise RapoError(
                f"cannot join {name!r} at {host}:{port} as rank {rank} of {size}, {backend}: {error}"
            ) from error

    def check(self, name: str) -> None:
        """Raises a `RapoError` where there is no such group."""
        if name not in self._groups:
            raise RapoError(
                f"there is no group {name!r} (there are: {sorted(self._groups)}); "
                "make it (/init_weights_update_group) first"
            )

    def receive(
        self, name: str, layout: Sequence[TensorMetadata], *, flattened: bool, device: torch.device
    ) -> list[tuple[str, torch.Tensor]]:
        """The tensors that the trainer sends: all in one broadcast of bytes, or one broadcast each.

        They are good until the next are received.

        Raises:
            RapoError: the trainer is gone or late. The group is of no more use, and is left.
        """
        self._only(name)
        flat = self._bytes(layout[-1].end_idx if layout and flattened else 0, device)
        named = views(flat, layout) if flattened else [(t.name, _empty(t, device)) for t in layout]
        buffers = [flat] if flattened else [values for _, values in named]
        group = self._groups[name]
        try:
            for work in [dist.broadcast(buffer, src=0, group=group, async_op=True) for buffer in buffers]:
                work.wait()
        except RuntimeError as error:
            self.leave(name)
            raise RapoError(
                f"the broadcast of {len(layout)} tensors over {name!r} broke: {error}; make a new group"
            ) from error
        return named

    def receive_from(self, name: str, source: int, nbytes: int, device: torch.device) -> torch.Tensor:
        """`[nbytes]` uint8 that one rank of the trainer sends.

        Raises:
            RapoError: it is gone or late. The group is of no more use, and is left.
        """
        self._only(name)
        flat = self._bytes(nbytes, device)
        try:
            self._groups[name].recv([flat], source, 0).wait()
        except RuntimeError as error:
            self.leave(name)
            raise RapoError(
                f"{nbytes} bytes of rank {source} over {name!r} did not come: {error}; make a new group"
            ) from error
        return flat

    def _only(self, name: str) -> None:
        """Leaves the groups of before: a trainer that sends over a new one has lost an engine of those."""
        self.check(name)
        for other in self._groups.keys() - {name}:
            self.leave(other)

    def _bytes(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """`[nbytes]` uint8, good until the next bytes are received."""
        if self._memory.numel() < nbytes or self._memory.device != device:
            self._memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return self._memory[:nbytes]

    def leave(self, name: str) -> None:
        """Destroys a group.

        Raises:
            RapoError: there is none of this name.
        """
        self.check(name)
        self._memory = self._memory.new_empty(0)
        dist.destroy_process_group(self._groups.pop(name))


def _empty(tensor: TensorMetadata, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
