"""Requests over engines: each where its context is or the load is least, and again where one is lost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.rollout.member import Member

R = TypeVar("R", bound=Sized)
T = TypeVar("T")


class TooFewEngines(RapoError):
    """Engines were lost, and too few are left to ask."""


@dataclass(eq=False)
class _Asked(Generic[R, T]):
    """A request that is not answered yet."""

    request: R
    answer: asyncio.Future[T]
    after: Hashable | None
    task: asyncio.Task[T] | None = None  # that sends it
    lost: bool = False  # with an engine that had it


class Dispatch(Generic[R, T]):
    """Sends requests as they come, each once it finds an engine with room, in their order.

    Attributes:
        resent: requests that were sent again, since the engine that had them was lost.
    """

    def __init__(
        self,
        members: Sequence[Member],
        send: Callable[[Member, R], Coroutine[Any, Any, T]],
        *,
        per_engine: int,
        minimum: int,
    ) -> None:
        """
        Args:
            members: the engines; of equally loaded ones the first is taken.
            send: asks one engine; after `EngineLost` the request waits for another one.
            per_engine: most requests under way at one engine.
            minimum: with fewer live engines nothing more is sent; what is under way still counts.
        """
        self.resent = 0
        self._members = members
        self._send = send
        self._per_engine = per_engine
        self._minimum = minimum
        self._waiting: deque[_Asked[R, T]] = deque()
        self._under_way: dict[asyncio.Task[T], tuple[_Asked[R, T], Member]] = {}
        self._closed = False
        self._had: dict[Hashable, Member] = {}  # what later requests come after

    async def ask(self, request: R, after: Hashable | None = None) -> T:
        """The answer. A request's length is what it loads an engine with.

        Requests that come `after` the same go to the engine that had the first of them, where that lives and
        has room: its prefix cache holds what they go on from.

        Where whoever asks is cancelled, so is the request; once closed, whoever asks is cancelled.

        Raises:
            TooFewEngines: fewer than `minimum` are left.
            RapoError: an engine refused it.
        """
        asked = _Asked[R, T](request, asyncio.get_running_loop().create_future(), after)
        if self._closed:
            asked.answer.cancel()
        self._waiting.append(asked)
        self._go_on()
        try:
            return await asked.answer
        finally:
            if asked.task is not None:
                asked.task.cancel()

    async def close(self) -> None:
        """Gives up what waits or is under way; nothing is sent any more."""
        self._closed = True
        while self._waiting:
            self._waiting.popleft().answer.cancel()
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _go_on(self) -> None:
        """Sends what finds an engine; refuses what never will."""
        while self._waiting and (member := self._engine_for(self._waiting[0])):
            asked = self._waiting.popleft()
            if asked.answer.done():
                continue  # whoever asked has gone
            if asked.after is not None and not ((first := self._had.get(asked.after)) and first.live):
                self._had[asked.after] = member
            self.resent += asked.lost
            asked.task = task = asyncio.ensure_future(self._send(member, asked.request))
            self._under_way[task] = asked, member
            task.add_done_callback(self._done)
        if sum(member.live for member in self._members) < self._minimum:
            while self._waiting:
                answer = self._waiting.popleft().answer
                if not answer.done():
                    answer.set_exception(TooFewEngines("too few engines are left to sample from"))

    def _done(self, task: asyncio.Task[T]) -> None:
        asked, _ = self._under_way.pop(task)
        if task.cancelled():
            asked.answer.cancel()
        elif isinstance(task.exception(), EngineLost):
            asked.lost = True
            self._waiting.appendleft(asked)
        elif not asked.answer.done():
            error = task.exception()
            if error is not None:
                asked.answer.set_exception(error)
            else:
                asked.answer.set_result(task.result())
        self._go_on()

    def _engine_for(self, asked: _Asked[R, T]) -> Member | None:
        """Of live engines that may have one more request: the one that had what it comes after, or else that
        with the fewest responses to make."""
        live = [member for member in self._members if member.live]
        if len(live) < self._minimum:
            return None
        load = dict.fromkeys(live, 0)
        requests = dict.fromkeys(live, 0)
        for one, member in self._under_way.values():
            if member in load:
                load[member] += len(one.request)
                requests[member] += 1
        free = [member for member in live if requests[member] < self._per_engine]
        if (first := self._had.get(asked.after)) in free:
            return first
        return min(free, key=load.__getitem__, default=None)
