"""The time that an episode takes for itself: what it waits for engines is counted apart."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class OwnTime:
    """A limit of seconds of an episode's own time.

    Attributes:
        own_s: seconds that it took for itself so far.
        engine_s: seconds that it waited for engines, for one or for several at a time.
    """

    def __init__(self, limit_s: float) -> None:
        self.own_s = self.engine_s = 0.0
        self._limit_s = limit_s
        self._since = 0.0  # loop time up to which both are counted
        self._waits = 0
        self._timeout: asyncio.Timeout | None = None

    @property
    def is_up(self) -> bool:
        """Whether a TimeoutError of `run` is this limit's, not the work's own."""
        return self._timeout is not None and self._timeout.expired()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result.

        Raises:
            TimeoutError: its own time is up.
        """
        self._since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(self._since + self._limit_s) as self._timeout:
                return await work
        finally:
            self._count()

    def wait(self, begins: bool) -> None:
        """The episode begins or ends to wait for an engine; it may wait for several at a time."""
        timeout = self._timeout
        assert timeout is not None
        self._count()
        self._waits += 1 if begins else -1
        if begins and self._waits == 1:
            timeout.reschedule(None)
        elif not begins and self._waits == 0 and not timeout.expired():
            timeout.reschedule(self._since + max(self._limit_s - self.own_s, 0.0))

    def _count(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._waits:
            self.engine_s += now - self._since
        else:
            self.own_s += now - self._since
        self._since = now
