"""Engines' health: one that is dead or hangs is noticed while a long request is under way."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_rapo.rollout.member import Member

MISSES = 3  # silences in a row after which an engine is lost: a busy one may miss one


async def watch(members: Callable[[], Sequence[Member]], interval: float) -> NoReturn:
    """Asks each of `members()` every `interval` seconds whether it is there, and takes out what is not.

    Any answer will do: whether an engine works is for its requests to find out.
    """
    misses: Counter[Member] = Counter()

    async def look(member: Member) -> None:
        problem = await member.client.silence(patience=interval)
        if member not in members():
            return  # an update has begun meanwhile
        misses[member] = misses[member] + 1 if problem else 0
        if misses[member] == MISSES:
            member.lose(f"it was silent {MISSES} times in a row: {problem}")

    while True:
        await asyncio.sleep(interval)
        await asyncio.gather(*(look(member) for member in members()))
