"""One engine of a pool: what it is asked, and whether it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from megatron_rapo.engines.engine import Engine
from megatron_rapo.errors import EngineLost

T = TypeVar("T")


class Member:
    """An engine until it is lost: the first failure takes it out, and ends all that is asked of it.

    One that comes back is a new member: nothing that was begun before can reach it.

    Attributes:
        client: its HTTP side.
        failure: why it was lost; None while it is live.
    """

    def __init__(self, client: Engine, on_lost: Callable[[Member], None]) -> None:
        self.client = client
        self.failure: str | None = None
        self._on_lost = on_lost
        self._asked: set[asyncio.Task[Any]] = set()

    @property
    def url(self) -> str:
        """The server's address."""
        return self.client.url

    @property
    def live(self) -> bool:
        """Whether it takes part."""
        return self.failure is None

    def lose(self, reason: str) -> None:
        """Takes it out, once: what it was asked ends with `EngineLost`."""
        if not self.live:
            return
        self.failure = reason
        for task in self._asked:
            task.cancel()
        self._on_lost(self)

    async def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a request to it.

        Raises:
            EngineLost: the request found it lost, or it was lost meanwhile; it is out from now on.
            RapoError: it refused, and stays.
        """
        if self.failure is not None:
            work.close()
            raise EngineLost(self.failure)
        task = asyncio.ensure_future(work)
        self._asked.add(task)
        try:
            return await task
        except EngineLost as error:
            self.lose(str(error))
            raise
        except asyncio.CancelledError:
            here = asyncio.current_task()
            if self.failure is None or (here is not None and here.cancelling()):
                raise  # whoever asked no longer wants the answer
            raise EngineLost(self.failure) from None
        finally:
            self._asked.discard(task)
