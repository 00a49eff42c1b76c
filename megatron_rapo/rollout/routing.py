"""A pool's requests by way of a router: it chooses the engine, and the pool which engines it has."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from megatron_rapo.background import all_of
from megatron_rapo.engines.address import server_of
from megatron_rapo.engines.engine import Router
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.rollout.member import Member
from megatron_rapo.rollout.membership import Membership
from megatron_rapo.rollout.requests import Request
from megatron_rapo.rollout.response import Response

T = TypeVar("T")

TRIES = 3  # of a request that fails while no engine is to blame
CONNECT_TIMEOUT_S = 5.0
REGISTRATION_TIMEOUT_S = 120.0  # the router asks an engine for its health and its model first


class Routing:
    """What a pool does with a router. Lives in the pool's event loop.

    The router does not tell which engine it gave a request to. So where one fails, all engines are asked for
    their versions, and those to blame are out.

    Args:
        router: its HTTP API.
        vocab_size: of the policy.
    """

    def __init__(self, router: Router, vocab_size: int) -> None:
        self._router = router
        self._vocab_size = vocab_size
        self._known: set[str] = set()  # engines that were ever the run's
        self._removals: set[asyncio.Task[None]] = set()
        self._stuck: asyncio.Future[str] | None = None  # told once requests under way may hang

    async def check(self, urls: Sequence[str]) -> None:
        """Raises RapoError where the router cannot be reached, or has workers beside these engines."""
        self._known |= set(urls)
        try:
            await self._router.check_workers(self._known)
        except EngineLost as error:
            raise _unusable(error) from error

    async def serve_with(self, urls: Sequence[str]) -> None:
        """Makes the engines at `urls`, which have the current weights, the router's only workers.

        Raises:
            RapoError: the router has others, cannot be reached, or does not take these.
        """
        self._known |= set(urls)
        await self._settled()
        try:
            await self._router.serve_with(urls, self._known, REGISTRATION_TIMEOUT_S)
        except EngineLost as error:
            raise _unusable(error) from error

    def take_out(self, member: Member) -> None:
        """Begins to remove a lost engine from the router. Requests that may hang there are sent again."""
        task = asyncio.ensure_future(self._take_out(member))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    async def _take_out(self, member: Member) -> None:
        try:
            await self._router.remove(member.url)
        except RapoError as error:
            print(f"the router still has {member.url}, whose responses are not used: {error}", flush=True)
        if not await asyncio.to_thread(_refuses_connections, member.url) and self._stuck is not None:
            self._stuck.set_result(f"{member.url} may have it, and is out: {member.failure}")
            self._stuck = None

    async def send(self, request: Request, members: Membership) -> list[Response]:
        """The request's responses.

        Raises:
            EngineLost: an engine was lost, and is no longer behind the router: it can be sent again.
            RapoError: it was refused, or fails though every engine is sound.
        """
        version, problems = request.sampling.weight_version, list[EngineLost]()
        while len(problems) < TRIES:
            before = members.changes
            try:
                return await self._unless_stuck(self._responses(request))
            except EngineLost as error:
                problems.append(error)
            await self._find_lost(members, version)
            if members.changes != before:
                raise problems[-1]
        raise RapoError(
            f"{problems[0]}. So it was {TRIES} times, though every engine answers and has version {version}; "
            "look into the router's log"
        )

    async def _responses(self, request: Request) -> list[Response]:
        answers = await self._router.generate(request.wanted)
        return request.responses(answers, self._vocab_size, f"an engine behind {self._router.url}")

    async def _unless_stuck(self, work: Coroutine[Any, Any, T]) -> T:
        if self._stuck is None:
            self._stuck = asyncio.get_running_loop().create_future()
        task, stuck = asyncio.ensure_future(work), self._stuck
        try:
            await asyncio.wait((task, stuck), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineLost(stuck.result())
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _find_lost(self, members: Membership, version: int) -> None:
        async def look(member: Member) -> None:
            with suppress(EngineLost):  # it is out then
                await member.ask(_check_version(member, version))

        await all_of(look(member) for member in members.live)
        await self._settled()

    async def _settled(self) -> None:
        """Until the router has no engine that was lost so far."""
        await asyncio.gather(*self._removals)


async def _check_version(member: Member, version: int) -> None:
    if (found := await member.client.weight_version()) != str(version):
        raise EngineLost(f"it has weights version {found!r} in place of {version}")


def _refuses_connections(url: str) -> bool:
    """Whether nothing listens there: a process that is dead has broken its connections, and none hangs."""
    host, port, _ = server_of(url)
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _unusable(error: EngineLost) -> RapoError:
    return RapoError(
        f"rollout.engine.router cannot be used: {error}. It is started by: python -m "
        "sglang_router.launch_router --host HOST --port PORT"
    )
