"""The watch over engines' health: so many silences in a row, and not in all."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rapo.rollout.watch import MISSES, watch


@pytest.mark.parametrize(
    ("answers", "lost_at"),
    [
        ("xxx", 3),
        ("xx.xx.xx.xx.", None),
        ("xx.xxx", 6),
        (".....", None),
    ],
)
def test_an_engine_is_lost_after_three_silences_in_a_row(answers: str, lost_at: int | None) -> None:
    assert MISSES == 3
    asked, lost = [], []

    async def silence(patience: float) -> str | None:
        asked.append(patience)
        return "no answer" if answers[len(asked) - 1] == "x" else None

    class Engine:
        client = SimpleNamespace(silence=silence)

        def lose(self, reason: str) -> None:
            lost.append((len(asked), reason))

    member: Any = Engine()

    async def run() -> None:
        task = asyncio.ensure_future(watch(lambda: [member], 1e-3))
        while len(asked) < len(answers) and not lost:
            assert not task.done()
            await asyncio.sleep(1e-4)
        await asyncio.sleep(0)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert [at for at, _ in lost] == ([] if lost_at is None else [lost_at])
    assert all(reason == "it was silent 3 times in a row: no answer" for _, reason in lost)
    assert set(asked) == {1e-3}


def test_a_silence_does_not_count_once_an_update_has_begun() -> None:
    asked, lost = [], []
    watched: list[Any] = []

    async def silence(patience: float) -> str | None:
        asked.append(patience)
        watched.clear()  # while it is asked, the members are taken out of the watch
        return "no answer"

    class Engine:
        client = SimpleNamespace(silence=silence)
        lose = staticmethod(lost.append)

    member: Any = Engine()

    async def run() -> None:
        task = asyncio.ensure_future(watch(lambda: list(watched), 1e-3))
        for _ in range(2 * MISSES):
            watched.append(member)
            while watched:
                assert not task.done()
                await asyncio.sleep(1e-4)
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert len(asked) == 2 * MISSES
    assert not lost
