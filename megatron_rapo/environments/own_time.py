"""The time that an episode takes for itself: what it waits for engines is not counted."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class OwnTime:
    """A limit of seconds of an episode's own time."""

    def __init__(self, limit_s: float) -> None:
        self._left = limit_s
        self._since: float | None = None  # loop time at which its own time began to run; None: it waits
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
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        async with asyncio.timeout_at(self._since + self._left) as self._timeout:
            return await work

    def wait(self, begins: bool) -> None:
        """The episode begins or ends to wait for an engine; it may wait for several at a time."""
        loop, timeout = asyncio.get_running_loop(), self._timeout
        assert timeout is not None
        self._waits += 1 if begins else -1
        if begins and self._waits == 1:
            assert self._since is not None
            self._left -= loop.time() - self._since
            timeout.reschedule(None)
        elif not begins and self._waits == 0 and not timeout.expired():
            self._since = loop.time()
            timeout.reschedule(self._since + max(self._left, 0.0))
