"""Requests over engines: each to the least loaded one, and once more where an engine is lost."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence, Sized
from typing import Any, Generic, TypeVar

from megatron_rapo.errors import EngineLost
from megatron_rapo.rollout.member import Member

R = TypeVar("R", bound=Sized)
T = TypeVar("T")


class Dispatch(Generic[R, T]):
    """One round of requests; afterwards its answers, and how many requests were sent again.

    Attributes:
        answers: in the requests' order; None where too few engines were left to ask.
        resent: requests that were sent again, since the engine that had them was lost.
    """

    def __init__(
        self,
        requests: Sequence[R],
        members: Sequence[Member],
        send: Callable[[Member, R], Coroutine[Any, Any, T]],
        *,
        per_engine: int,
        minimum: int,
    ) -> None:
        """
        Args:
            requests: a request's length is what it loads an engine with.
            members: the engines; of equally loaded ones the first is taken.
            send: asks one engine; after `EngineLost` the request waits for another one.
            per_engine: most requests under way at one engine.
            minimum: with fewer live engines nothing more is sent; what is under way still counts.
        """
        self.answers: list[T | None] = [None] * len(requests)
        self.resent = 0
        self._requests = requests
        self._members = members
        self._send = send
        self._per_engine = per_engine
        self._minimum = minimum
        self._waiting = deque(range(len(requests)))
        self._under_way: dict[asyncio.Task[T], tuple[int, Member]] = {}

    async def run(self) -> None:
        """Sends all requests, and waits for the answers.

        Raises:
            RapoError: an engine refused a request. The others are given up at once.
        """
        lost: set[int] = set()
        try:
            while True:
                while self._waiting and (member := self._least_loaded()):
                    number = self._waiting.popleft()
                    self.resent += number in lost
                    task = asyncio.ensure_future(self._send(member, self._requests[number]))
                    self._under_way[task] = number, member
                if not self._under_way:
                    return
                done, _ = await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    number, _ = self._under_way.pop(task)
                    try:
                        self.answers[number] = task.result()
                    except EngineLost:
                        lost.add(number)
                        self._waiting.appendleft(number)
        finally:
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    def _least_loaded(self) -> Member | None:
        """The live engine with the fewest responses to make that may have one more request."""
        live = [member for member in self._members if member.live]
        if len(live) < self._minimum:
            return None
        load = dict.fromkeys(live, 0)
        requests = dict.fromkeys(live, 0)
        for number, member in self._under_way.values():
            if member in load:
                load[member] += len(self._requests[number])
                requests[member] += 1
        free = [member for member in live if requests[member] < self._per_engine]
        return min(free, key=load.__getitem__, default=None)
