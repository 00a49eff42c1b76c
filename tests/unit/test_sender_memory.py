"""Shared memory of a sender stays mapped from one update to the next, and no longer."""

from __future__ import annotations

import asyncio
import weakref

import pytest
import torch

from megatron_rapo.embedded_server import sender_memory
from megatron_rapo.embedded_server.sender_memory import SenderMemory


def shared() -> torch.Tensor:
    return torch.zeros(8).share_memory_()


def test_memory_is_kept_until_an_update_does_without_it() -> None:
    async def updates() -> list[bool]:
        memory, tensor = SenderMemory(), shared()
        watched = weakref.ref(tensor.untyped_storage())
        memory.keep([tensor])
        del tensor
        alive = []
        for _ in range(3):
            alive.append(watched() is not None)
            memory.end_update()
        return [*alive, watched() is not None]

    assert asyncio.run(updates()) == [True, True, False, False]


def test_memory_of_a_sender_that_is_gone_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_memory, "KEPT_S", 0.01)

    async def update() -> bool:
        memory, tensor = SenderMemory(), shared()
        watched = weakref.ref(tensor.untyped_storage())
        memory.keep([tensor])
        del tensor
        memory.end_update()
        await asyncio.sleep(0.1)
        return watched() is not None

    assert not asyncio.run(update())


def test_only_shared_memory_is_kept() -> None:
    memory, tensor = SenderMemory(), torch.zeros(8)
    watched = weakref.ref(tensor.untyped_storage())
    memory.keep([tensor])
    del tensor
    assert watched() is None
