"""Who takes part: the engines of a pool, those that are lost, and those that come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from megatron_rapo.background import all_of
from megatron_rapo.engines.engine import Engine
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.member import Member
from megatron_rapo.rollout.revival import Reviver


class Membership:
    """The engines of one pool. Lives in the pool's event loop, but for what only reads.

    Attributes:
        changes: counts engines that left or came back.

    Args:
        urls: the engines that the run begins with; their number counts from 0.
        client_of: makes the client of an address.
        minimum: with fewer live ones there is no way on.
        reviver: brings lost ones back, for all heads; None where another rank does.
        on_lost: told of each that is lost.
    """

    def __init__(
        self,
        urls: Sequence[str],
        client_of: Callable[[str], Engine],
        *,
        minimum: int,
        reviver: Reviver | None,
        on_lost: Callable[[Member], None] | None = None,
    ) -> None:
        self.size = len(urls)
        self.minimum = minimum
        self.changes = 0
        self._client_of = client_of
        self._reviver = reviver
        self._on_lost = on_lost
        self._members = [self._member(url) for url in urls]
        self._returning: dict[int, asyncio.Task[str]] = {}

    @property
    def live(self) -> list[Member]:
        """Those that take part, in order."""
        return [member for member in self._members if member.live]

    @property
    def failures(self) -> dict[str, str]:
        """Why each engine that is out is out, by address."""
        return {member.url: member.failure for member in self._members if member.failure is not None}

    def too_few(self) -> RapoError:
        """The error that says so, with each engine's reason."""
        reasons = "".join(f"\n  {url}: {reason}" for url, reason in self.failures.items())
        return RapoError(
            f"{len(self.live)} of {self.size} engines are left, where rollout.minimum_engines = "
            f"{self.minimum} are needed; mend what ended them, and start the run again: it goes on from its "
            f"newest checkpoint.{reasons}"
        )

    async def until_healthy(self, timeout: float) -> None:
        """Waits until all are ready, and refuses those of another model."""

        async def wait(member: Member) -> None:
            await member.client.until_healthy(timeout)
            if self._reviver is not None:
                await self._reviver.check(member.client)

        await all_of(wait(member) for member in self._members)

    async def use(self, urls: Sequence[str]) -> None:
        """Goes on with these engines alone."""
        if self._reviver is None:
            known = {member.url: member for member in self.live}
            self._members = [known.get(url) or self._member(url) for url in urls]
            return
        for member in self.live:  # its place stays: the engine may come back
            if member.url not in urls:
                member.lose("it did not get the current weights")

    async def revive(self, lost: Mapping[str, str]) -> None:
        """Begins to bring back what is lost, and waits for it as far as too few are live.

        Args:
            lost: engines that other heads lost, with the reasons.

        Raises:
            RapoError: too few are live, and no more can be brought back.
        """
        for number, member in enumerate(self._members):
            if member.url in lost:
                member.lose(f"another head lost it: {lost[member.url]}")
            if member.live or number in self._returning:
                continue
            if self._reviver is not None and self._reviver.may_return(number):
                work = self._reviver.bring_back(number, member.url, self._client_of)
                self._returning[number] = asyncio.ensure_future(work)
        self._admit()
        while len(self.live) < self.minimum:
            if not self._returning:
                raise self.too_few()
            await asyncio.wait(self._returning.values(), return_when=asyncio.FIRST_COMPLETED)
            self._admit()

    def _admit(self) -> None:
        """Takes up those that are back by now."""
        for number in [number for number, task in self._returning.items() if task.done()]:
            try:
                url = self._returning.pop(number).result()
            except RapoError as error:
                self._members[number].failure = str(error)
                print(f"engine {self._members[number].url} stays out: {error}", flush=True)
            else:
                self._members[number] = self._member(url)
                self.changes += 1
                print(f"engine {url} is back, and gets the current weights", flush=True)

    def _member(self, url: str) -> Member:
        return Member(self._client_of(url), self._tell)

    def _tell(self, member: Member) -> None:
        self.changes += 1
        left = f"{len(self.live)} of {self.size} are left"
        print(f"engine {member.url} is out ({left}): {member.failure}", flush=True)
        if self._on_lost is not None:
            self._on_lost(member)
