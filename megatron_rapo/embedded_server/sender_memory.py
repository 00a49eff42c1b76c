"""The shared memory that a sender's weights come in, kept open from one update to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import torch

KEPT_S = 300.0  # after an update: a sender that is gone gets its machine's shared memory back


class SenderMemory:
    """What the last update was read from: mapping memory anew costs as much as copying out of it."""

    def __init__(self) -> None:
        self._last: dict[int, torch.UntypedStorage] = {}
        self._now: dict[int, torch.UntypedStorage] = {}
        self._expiry: asyncio.TimerHandle | None = None

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keeps what these tensors lie in, if it is a sender's."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.device.type == "cpu" and storage.is_shared():
                self._now[storage.data_ptr()] = storage

    def end_update(self) -> None:
        """Lets go of what this update did not use; in the event loop's thread."""
        self._last, self._now = self._now, {}
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_later(KEPT_S, self._last.clear)
