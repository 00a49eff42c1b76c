"""The engines of a run as one: requests in, responses out, all from one version of the weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from megatron_rapo.background import BackgroundLoop, all_of
from megatron_rapo.engines.engine import Connect, ConnectRouter, Diagnose, Engine
from megatron_rapo.engines.exchange import http_client
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.rollout.dispatch import Dispatch
from megatron_rapo.rollout.member import Member
from megatron_rapo.rollout.membership import Membership
from megatron_rapo.rollout.requests import Request, check_tokens
from megatron_rapo.rollout.response import Response
from megatron_rapo.rollout.revival import Reviver
from megatron_rapo.rollout.round import Round
from megatron_rapo.rollout.routing import Routing
from megatron_rapo.rollout.watch import watch

T = TypeVar("T")
P = TypeVar("P")

NoteRequest = Callable[[str, float, float, int], None]
"""Engine, when the request was sent and when it ended (Unix seconds), and the responses wanted."""


class EnginePool:
    """Servers that sample from the same policy, behind plain calls; a context manager.

    Each data-parallel head has a pool of its own over the same addresses, and finds out by itself which
    engines fail: one that does is out, and what it was asked goes to the others. Engines come back only
    where weights are published: the main rank's pool revives them, sends them the weights, and all heads
    then `use` those that have them.

    Args:
        urls: addresses of the servers, http://HOST:PORT.
        connect: makes what speaks to each: the kind of the engines.
        vocab_size: of the policy; token ids outside it are refused.
        prompts_per_request: most prompts that share one HTTP request; a router gets a request a response.
        request_timeout: seconds for one request's answer; an engine that takes longer is lost.
        head: the data-parallel head's number: heads begin at different servers.
        requests_per_engine: most requests of this head under way at one engine.
        minimum_engines: with fewer live ones, sampling ends early and weights are not published.
        health_interval: seconds between two looks at each engine's health; None: it is not looked at.
        reviver: brings lost engines back; the main rank's pool has one.
        diagnose: says why the server at a URL is gone, where that can be known (`LocalServers.diagnose`).
        router: what speaks to the router through which prompts go; None: the pool spreads them itself.
        note: is told of each request that has ended, from the pool's own thread.

    Attributes:
        resent: requests that were sent again so far, since the engine that had them was lost.
    """

    def __init__(
        self,
        urls: Sequence[str],
        connect: Connect,
        *,
        vocab_size: int,
        prompts_per_request: int,
        request_timeout: float,
        head: int = 0,
        requests_per_engine: int = 32,
        minimum_engines: int = 1,
        health_interval: float | None = None,
        reviver: Reviver | None = None,
        diagnose: Diagnose | None = None,
        router: ConnectRouter | None = None,
        note: NoteRequest | None = None,
    ) -> None:
        if not urls:
            raise ValueError("a pool needs at least one server")
        self.resent = 0
        self._vocab_size = vocab_size
        self._prompts_per_request = prompts_per_request if router is None else 1
        self._head = head
        self._requests_per_engine = requests_per_engine
        self._note = note
        self._starting = self._updating = False
        self._offloaded: set[str] = set()  # engines that gave their memory back
        self._http = http_client()
        self._routing: Routing | None = None
        if router is not None:
            self._routing = Routing(router(self._http, timeout=request_timeout), vocab_size)
        self._members = Membership(
            urls,
            lambda url: connect(self._http, url, timeout=request_timeout, diagnose=diagnose),
            minimum=minimum_engines,
            reviver=reviver,
            on_lost=self._routing.take_out if self._routing else None,
        )
        self._loop = BackgroundLoop("engine pool")
        if health_interval is not None:
            self._loop.start(watch(self._to_watch, health_interval))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(self._http.aclose())
        self._loop.close()

    # Who takes part

    @property
    def urls(self) -> list[str]:
        """Addresses of the live engines, in order."""
        return [member.url for member in self._members.live]

    @property
    def membership(self) -> int:
        """Another number once an engine has left or come back, also one that came back at its old address."""
        return self._members.changes

    @property
    def failures(self) -> dict[str, str]:
        """Why each engine that is out is out, by address."""
        return self._members.failures

    def wait_until_healthy(self, timeout: float) -> None:
        """Waits until every server is ready.

        Raises:
            RapoError: one is not within `timeout` seconds, is known to have ended, or serves another model;
                or the router cannot be reached, or has workers that are none of them.
        """
        self._starting = True  # a server that is not up yet is silent
        try:
            self._loop.run(self._members.until_healthy(timeout))
        finally:
            self._starting = False
        if self._routing is not None:
            self._loop.run(self._routing.check(self.urls))

    def use(self, urls: Sequence[str]) -> None:
        """Takes part with these engines alone from now on: those that have the newest weights."""
        self._loop.run(self._members.use(urls))

    def revive(self, lost: Mapping[str, str] | None = None) -> None:
        """Brings back engines that were lost, for the weight update that follows.

        A restart takes its time: as long as enough engines are live it goes on in the background, and the
        engine takes part from a later `revive` on.

        Args:
            lost: engines that other heads lost, with the reasons.

        Raises:
            RapoError: too few are live, and no more can be brought back.
        """
        self._loop.run(self._members.revive(lost or {}))

    # Responses

    @contextmanager
    def round(self) -> Iterator[Round]:
        """Takes requests until it is left; what is under way then is given up."""
        # By the order of the start, so that heads begin at different engines.
        live = self._members.live
        first = self._head % max(1, len(live))
        opened = Round(self._loop, self._dispatch(live[first:] + live[:first]))
        try:
            yield opened
        finally:
            opened.close()
            self.resent += opened.resent

    def requests(self, prompts: int) -> int:
        """How many of so many prompts share a request.

        By the engines of the start, live or not: a request is the same whatever fails.
        """
        return min(self._prompts_per_request, max(1, -(-prompts // self._members.size)))

    def one_request_at_a_time(self) -> bool:
        """Whether an engine serves one request after the other, so that what belongs together is sent so."""
        return any(member.client.one_request_at_a_time for member in self._members.live)

    def _dispatch(self, members: Sequence[Member]) -> Dispatch[Request, list[Response]]:
        return Dispatch(
            members, self._send, per_engine=self._requests_per_engine, minimum=self._members.minimum
        )

    async def _send(self, member: Member, request: Request) -> list[Response]:
        check_tokens(request, self._vocab_size)
        begun = time.time()
        try:
            return await self._answers(member, request)
        finally:
            if self._note is not None:
                name = member.url if self._routing is None else "router"
                self._note(name, begun, time.time(), len(request))

    async def _answers(self, member: Member, request: Request) -> list[Response]:
        if self._routing is not None:  # `member` counts among the engines that bound what is under way
            return await self._routing.send(request, self._members)

        async def responses() -> list[Response]:
            answers = await member.client.generate(request.wanted)
            return request.responses(answers, self._vocab_size, member.url)

        return await member.ask(responses())

    # Weights

    def release_memory(self) -> None:
        """Has every live engine give back the memory of weights and cache; one that is lost then is out.

        Raises:
            RapoError: an engine refused.
        """

        async def release(member: Member) -> None:
            with suppress(EngineLost):
                await member.ask(member.client.release_memory())
                self._offloaded.add(member.url)

        self._loop.run(all_of(release(member) for member in self._members.live))

    def resume_memory(self) -> None:
        """Has those engines take it again, for a weight update that brings everything.

        Raises:
            EngineLost: an engine was lost meanwhile, and is out.
            RapoError: an engine refused.
        """

        async def resume(member: Member) -> None:
            await member.ask(member.client.resume_memory())
            self._offloaded.discard(member.url)

        offloaded = [member for member in self._members.live if member.url in self._offloaded]
        self._loop.run(all_of(resume(member) for member in offloaded))

    def tensor_parallel(self) -> list[int]:
        """How many ranks each live engine spreads its weights over, in the order of `urls`."""
        infos = self._loop.run(self._of_each(lambda client: client.info()))
        return [info.tensor_parallel for info in infos]

    def software(self) -> str:
        """Names and versions of the live engines' software."""
        infos = self._loop.run(self._of_each(lambda client: client.info()))
        return ", ".join(sorted({info.software for info in infos}))

    def take_slices(self) -> bool:
        """Whether every live engine takes slices of tensors from several trainer ranks."""
        return all(member.client.takes_slices for member in self._members.live)

    def weights_checksums(self, dtype: str) -> dict[str, dict[str, int]]:
        """The checksum of each tensor, by URL, of the live engines that tell them and compute in `dtype`.

        Raises:
            EngineLost: an engine was lost meanwhile, and is out.
        """

        async def checksums(client: Engine) -> dict[str, int] | None:
            found = await client.weights_checksum()
            return found[1] if found is not None and (await client.info()).dtype == dtype else None

        every = zip(self.urls, self._loop.run(self._of_each(checksums)), strict=True)
        return {url: found for url, found in every if found is not None}

    def begin_update(self) -> None:
        """Pauses generation, empties the cache and opens an update, in every live engine.

        Where too few are live, others are brought back first.

        Raises:
            EngineLost: an engine was lost meanwhile, and is out. `abandon_update`, then begin again.
            RapoError: an engine refused, or too few can be brought back.
        """
        self._updating = True
        self.revive()
        self._loop.run(self._of_each(lambda client: client.begin_update()))

    def each(self, ask: Callable[[Engine, P], Coroutine[Any, Any, T]], parts: Sequence[P]) -> Future[list[T]]:
        """Asks each live engine, without waiting.

        Args:
            ask: what is asked of one, given its part.
            parts: one for each of `urls`, in that order.

        Returns:
            The answers, in that order. The first failure is raised at once: an engine that is lost
            (`EngineLost`) can hold up the others for ever.
        """
        members = self._members.live
        if len(parts) != len(members):
            failed: Future[list[T]] = Future()
            failed.set_exception(
                EngineLost(f"{len(parts)} parts for {len(members)} live engines: one was lost meanwhile")
            )
            return failed
        return self._loop.start(
            all_of(member.ask(ask(member.client, part)) for member, part in zip(members, parts, strict=True))
        )

    def end_update(self, weight_version: int) -> None:
        """Closes the update in every live engine, lets it generate, and reads the version back.

        Raises:
            EngineLost, RapoError: as `begin_update`; or an engine has another version.
        """

        async def end(client: Engine) -> None:
            await client.end_update(weight_version)
            await _check_version(client, weight_version)

        self._loop.run(self._of_each(end))
        self._loop.run(self._route())
        self._updating = False

    def abandon_update(self) -> None:
        """After a failure: lets the live engines generate again, as far as they can."""

        async def abandon() -> None:
            work = [member.client.abandon_update() for member in self._members.live]
            await asyncio.gather(*work)

        self._loop.run(abandon())
        self._updating = False

    def update_weights(self, model_path: Path, weight_version: int) -> None:
        """Makes every live server load a checkpoint, and reads back that it has.

        A server that is lost meanwhile is out; where too few are left then, others are brought back and
        load it as well.

        Args:
            model_path: HF folder with safetensors, which the servers can read.
            weight_version: what these weights are called from now on.

        Raises:
            RapoError: a server refused them or has another version afterwards, or too few are left.
        """
        self._updating = True
        try:
            self._loop.run(self._update_from_disk(model_path, weight_version))
        finally:
            self._updating = False

    async def _update_from_disk(self, model_path: Path, weight_version: int) -> None:
        updated: set[Member] = set()

        async def load(client: Engine) -> None:
            await client.load_checkpoint(model_path, weight_version)
            await _check_version(client, weight_version)

        async def update(member: Member) -> None:
            try:
                await member.ask(load(member.client))
                updated.add(member)
            except EngineLost:
                pass  # it is out, which does not keep others from loading

        await self._members.revive({})
        while behind := [member for member in self._members.live if member not in updated]:
            await all_of(update(member) for member in behind)
            if len(self._members.live) < self._members.minimum:
                await self._members.revive({})
        await self._route()

    async def _route(self) -> None:
        """Has the router send to those that are live, all of which have the current weights."""
        if self._routing is not None:
            await self._routing.serve_with(self.urls)

    async def _of_each(self, ask: Callable[[Engine], Coroutine[Any, Any, T]]) -> list[T]:
        return await all_of(member.ask(ask(member.client)) for member in self._members.live)

    def _to_watch(self) -> list[Member]:
        """Those that must answer now: a start and an update have time limits of their own."""
        return [] if self._starting or self._updating else self._members.live


async def _check_version(client: Engine, weight_version: int) -> None:
    if (found := await client.weight_version()) != str(weight_version):
        raise RapoError(
            f"{client.url} has weights version {found!r} after an update to {weight_version}: "
            "another run updates the same server; give every run its own"
        )
