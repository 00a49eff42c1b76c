"""The gateway: a server in the event loop of the environments, on this machine alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from megatron_rapo.episode.environment import Generate
from megatron_rapo.gateway.app import create_app
from megatron_rapo.gateway.route import Route

_POLL_S = 0.01
_IDLE_S = 3600  # that a connection may idle between two turns, as a tool runs
_END_S = 1  # for answers that are under way at the end


class Gateway:
    """Serves the episodes of a process, each under a key of its own; it runs in the loop that starts it."""

    def __init__(self, model: str, vocabulary: int, max_turns: int) -> None:
        """
        Args:
            model: the name that requests call the policy by.
            vocabulary: tokens that the model has.
            max_turns: most turns of an episode.
        """
        self.model = model
        self._vocabulary = vocabulary
        self._max_turns = max_turns
        self._routes: dict[str, Route] = {}
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._address = ""

    async def start(self) -> None:
        """Listens, unless it does already."""
        if self._serving is None:
            listening = socket.create_server(("127.0.0.1", 0))
            host, port = listening.getsockname()
            self._address = f"http://{host}:{port}"
            config = uvicorn.Config(
                create_app(self._routes, self.model),
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=_END_S,
            )
            self._server = uvicorn.Server(config)
            self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        assert self._server is not None
        while not self._server.started:
            if self._serving.done():
                self._serving.result()
                raise RuntimeError("the gateway's server ended before it served")
            await asyncio.sleep(_POLL_S)

    @asynccontextmanager
    async def episode(self, generate: Generate) -> AsyncIterator[Route]:
        """The route of an episode, whose requests `generate` answers. Once it is left, they are refused."""
        route = Route(generate, self._vocabulary, self._max_turns)
        self._routes[route.key] = route
        try:
            yield route
        finally:
            del self._routes[route.key]
            await route.aclose()

    def url_of(self, route: Route) -> str:
        """What the route's paths begin with; clients in OpenAI's manner get `/v1` behind it."""
        return f"{self._address}/{route.key}"

    async def aclose(self) -> None:
        """Stops serving, and frees the port."""
        if self._serving is None:
            return
        assert self._server is not None
        self._server.should_exit = True
        serving, self._serving = self._serving, None
        await serving
