"""One HTTP request to an engine: bounded in time, its answer checked, its failures told apart and named."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from urllib.parse import urlsplit

import httpx

from megatron_rapo.engines.engine import Diagnose
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.wire.access import API_KEY_VARIABLE, api_key_from_environment, is_loopback

CONNECT_TIMEOUT_S = 10.0
CONTROL_TIMEOUT_S = 60.0  # for requests that are answered at once, or as long as others have, if that is less
HEALTH_TIMEOUT_S = 5.0  # for one answer about its health
POLL_S = 0.1  # between two questions whether the server is ready
SEE_LOG = "look into the server's log"
EXCERPT = 500  # characters of an answer that an error shows


class NoSuchRoute(RapoError):
    """The engine does not know the path: it is of another generation, or not an engine."""


def http_client() -> httpx.AsyncClient:
    """Connections to engines, with the API key of the environment if there is one."""
    key = api_key_from_environment()
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        trust_env=False,  # the environment's proxy is for the outside world
        # `Exchange` bounds each request as a whole.
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        # None is kept: one that the server closes between two steps would look like a crash.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    )


class Exchange:
    """Requests to the server at one address.

    Args:
        http: where connections come from.
        url: the server's address, http://HOST:PORT.
        diagnose: asked for the reason when the connection fails.

    Raises:
        RapoError: the server is on another machine, and there is no API key. Whoever reaches a server can
            replace its model.
    """

    def __init__(self, http: httpx.AsyncClient, url: str, diagnose: Diagnose | None) -> None:
        host = urlsplit(url).hostname or ""
        if not is_loopback(host) and "authorization" not in http.headers:
            raise RapoError(
                f"{url} is reached over the network, which takes an API key: start the server with one, and "
                f"set {API_KEY_VARIABLE} to it"
            )
        self.url = url.rstrip("/")
        self._http = http
        self._diagnose = diagnose

    async def json(
        self, method: str, path: str, body: Any = None, *, timeout: float, when_late: str = SEE_LOG
    ) -> Any:
        """The JSON that the server answers within `timeout` seconds; `when_late` says what helps otherwise.

        Raises:
            EngineLost: the server cannot be reached, is late, fails inside (status 5xx), or sends no JSON.
            RapoError: it refuses: status 4xx, or `success` that is not true.
        """
        response = await self.request(method, path, body, timeout=timeout, when_late=when_late)
        try:
            answer = response.json()
        except ValueError:
            raise self.malformed(path, "not JSON", response.text) from None
        if isinstance(answer, dict) and answer.get("success", True) is not True:
            raise RapoError(f"{self.url}{path} refused: {_excerpt(str(answer.get('message', answer)))}")
        return answer

    async def request(
        self, method: str, path: str, body: Any = None, *, timeout: float, when_late: str = SEE_LOG
    ) -> httpx.Response:
        """The response, of status 200, or 202 where a router accepts; raises as `json` does."""
        what = f"{method} {self.url}{path}"
        response = await self._response(what, method, path, body, timeout, when_late)
        status = response.status_code
        if status in (200, 202):
            return response
        if status == 401:
            raise RapoError(
                f"{what} answered 401: the server demands an API key; set {API_KEY_VARIABLE} to it"
            )
        message = (
            f"{what} answered status {status}: {_excerpt(response.text)}; "
            "the reason stands in the answer or in the server's log"
        )
        if status == 404:
            raise NoSuchRoute(message)
        raise RapoError(message) if 400 <= status < 500 else EngineLost(message)

    async def status(self, method: str, path: str, *, timeout: float, key: str | None = None) -> int:
        """The status of the answer, whatever it is; `key` in place of the one that there is.

        Raises:
            EngineLost: there is no answer.
        """
        what = f"{method} {self.url}{path}"
        return (await self._response(what, method, path, None, timeout, SEE_LOG, key)).status_code

    async def health_problem(self, timeout: float) -> str | None:
        """Why the server is not ready; None once it is."""
        try:
            response = await self._http.get(f"{self.url}/health", timeout=timeout)
        except httpx.HTTPError as error:
            return _named(error)
        return None if response.status_code == 200 else f"status {response.status_code}"

    async def until_healthy(self, timeout: float) -> None:
        """Waits until the server is ready.

        Raises:
            EngineLost: it is not within `timeout` seconds, or is known to have ended.
        """
        deadline = time.monotonic() + timeout
        while problem := await self.health_problem(
            max(POLL_S, min(HEALTH_TIMEOUT_S, deadline - time.monotonic()))
        ):
            if reason := self.diagnosis():
                raise EngineLost(f"{self.url} did not become ready: {reason}")
            if time.monotonic() > deadline:
                raise EngineLost(
                    f"{self.url} was not ready within {timeout:g} s ({problem}); look into the server's log, "
                    "or raise rollout.startup_timeout_s"
                )
            await asyncio.sleep(POLL_S)

    async def _response(
        self,
        what: str,
        method: str,
        path: str,
        body: Any,
        timeout: float,
        when_late: str,
        key: str | None = None,
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else None
        try:
            async with asyncio.timeout(timeout):  # httpx bounds the pauses between bytes, not the whole
                return await self._http.request(method, self.url + path, json=body, headers=headers)
        except TimeoutError:
            raise self._lost(f"{what} was not answered within {timeout:g} s", when_late) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._lost(
                f"{what}: cannot connect ({_named(error)})",
                "check that the server runs and that the address is right",
            ) from error
        except httpx.HTTPError as error:
            raise self._lost(f"{what}: the connection was lost ({_named(error)})", SEE_LOG) from error

    def diagnosis(self) -> str | None:
        """What is known of the server's end; None if nothing."""
        return self._diagnose(self.url) if self._diagnose else None

    def malformed(self, path: str, what: str, answer: Any) -> EngineLost:
        """The error for an answer that no engine sends."""
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return EngineLost(
            f"{self.url}{path} answered {what}: {_excerpt(text)}; is it a server of rollout.engine.kind, of "
            "a version that docs/engines.md names?"
        )

    def _lost(self, what: str, remedy: str) -> EngineLost:
        return EngineLost(f"{what}; {self.diagnosis() or remedy}")


def _named(error: Exception) -> str:
    """An exception in a message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _excerpt(text: str) -> str:
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}… ({len(text)} characters)"
