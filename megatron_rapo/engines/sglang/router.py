"""The HTTP API of SGLang's router (`sglang-router` 0.3.2, the Model Gateway), as far as a pool needs it."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_rapo.background import all_of
from megatron_rapo.engines.address import server_of
from megatron_rapo.engines.engine import Generated, Generation, Router
from megatron_rapo.engines.exchange import CONTROL_TIMEOUT_S, Exchange, NoSuchRoute
from megatron_rapo.engines.sglang.answers import sampling_params, to_generated
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.wire.access import api_key_from_environment

POLL_S = 0.1  # between two looks at whether the router has done what it accepted
OPEN_FILES = 65536  # each response under way is a connection


@dataclass(frozen=True)
class _Worker:
    """An engine as the router lists it: `id` is the router's name of it."""

    id: str
    url: str
    healthy: bool


class SGLangRouter(Router):
    """Requests to one router. Each is bounded in time, and fails as one to an engine does (`Exchange`).

    Args:
        http: where connections come from.
        url: the router's address, http://HOST:PORT.
        timeout: seconds for the answer to one response's request.
    """

    def __init__(self, http: httpx.AsyncClient, url: str, *, timeout: float) -> None:
        self._exchange = Exchange(http, url, None)
        self._timeout = timeout
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))

    @property
    def url(self) -> str:
        """The router's address."""
        return self._exchange.url

    async def generate(self, wanted: Sequence[Generation]) -> list[Generated]:
        """As `Router.generate`.

        Each is a request of its own: the router takes one set of sampling parameters a request.
        """
        return await all_of(self._generate(one) for one in wanted)

    async def _generate(self, wanted: Generation) -> Generated:
        body = {
            "input_ids": wanted.token_ids,
            "sampling_params": sampling_params(wanted),
            "return_logprob": True,
        }
        answer = await self._exchange.json("POST", "/generate", body, timeout=self._timeout)
        if not isinstance(answer, dict):
            raise self._exchange.malformed("/generate", "no response", answer)
        return to_generated(answer, f"an engine behind {self.url}")

    async def check_workers(self, known: Collection[str]) -> None:
        """Refuses a router that sends to others than the engines at these addresses.

        Raises:
            RapoError: it does, or it cannot be reached.
        """
        known_servers = {server_of(url) for url in known}
        workers = await self._workers()
        if others := [worker.url for server, worker in workers.items() if server not in known_servers]:
            raise RapoError(
                f"the router {self.url} has workers that are no engines of this run, whose weights are not "
                f"known: {', '.join(others)}; remove them there, name them in rollout.engine.urls, or give "
                "this run a router of its own"
            )

    async def serve_with(self, urls: Sequence[str], known: Collection[str], timeout: float) -> None:
        """Makes the engines at `urls` the router's only workers, and waits until it sends to each.

        Args:
            urls: engines that may serve.
            known: addresses that are or were this run's; those not among `urls` are removed.
            timeout: seconds for it.

        Raises:
            RapoError: it has other workers, cannot be reached, or does not take them.
        """
        await self.check_workers(known)
        wanted = {server_of(url): url for url in urls}
        deadline = time.monotonic() + timeout
        added: set[str] = set()
        while True:
            workers = await self._workers()
            serving = {server for server, worker in workers.items() if worker.healthy}
            if set(workers) == serving == set(wanted):
                return
            if time.monotonic() > deadline:
                missing = [url for server, url in wanted.items() if server not in serving]
                raise RapoError(
                    f"the router {self.url} does not send to {', '.join(missing) or 'its engines alone'} "
                    f"after {timeout:g} s; check that it reaches them, in its log"
                )
            for server, worker in workers.items():
                # One that an update made look ill is added anew: the router would wait for minutes.
                if server not in wanted or not (worker.healthy or worker.url in added):
                    await self._delete(worker)
            for url in [url for server, url in wanted.items() if server not in workers]:
                if url not in added:
                    key = api_key_from_environment()
                    body = {"url": url, **({"api_key": key} if key else {})}
                    await self._tell("POST", "/workers", body)
                    added.add(url)
            await asyncio.sleep(POLL_S)

    async def remove(self, url: str) -> None:
        """Makes the router send nothing more to this engine; requests that it has there stay under way."""
        deadline = time.monotonic() + CONTROL_TIMEOUT_S
        while worker := (await self._workers()).get(server_of(url)):
            if time.monotonic() > deadline:
                raise EngineLost(f"the router {self.url} did not remove {url} in {CONTROL_TIMEOUT_S:g} s")
            await self._delete(worker)
            await asyncio.sleep(POLL_S)

    async def _delete(self, worker: _Worker) -> None:
        with suppress(NoSuchRoute):  # another head's pool removed it meanwhile
            await self._tell("DELETE", f"/workers/{worker.id}")

    async def _workers(self) -> Mapping[tuple[str, int, str], _Worker]:
        """By server."""
        answer = await self._exchange.json("GET", "/workers", timeout=CONTROL_TIMEOUT_S)
        try:
            workers = [
                _Worker(str(entry["id"]), str(entry["url"]), bool(entry["is_healthy"]))
                for entry in answer["workers"]
            ]
        except (KeyError, TypeError, ValueError):
            raise RapoError(
                f"rollout.engine.router = {self.url} answers no list of HTTP workers, but {str(answer)[:200]}"
                "; is this SGLang's router (python -m sglang_router.launch_router)?"
            ) from None
        return {server_of(worker.url): worker for worker in workers}

    async def _tell(self, method: str, path: str, body: Any = None) -> None:
        """What the router does some time after it has answered."""
        await self._exchange.request(method, path, body, timeout=CONTROL_TIMEOUT_S)
