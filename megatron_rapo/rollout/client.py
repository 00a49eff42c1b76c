"""One engine over SGLang's HTTP contract (0.5.14 to 0.5.23, and the embedded server)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.api_key import API_KEY_VARIABLE, api_key_from_environment

Diagnose = Callable[[str], str | None]
"""Says what is known of the server at a URL once a request to it has failed: None if nothing."""

CONNECT_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 5.0
POLL_S = 0.1  # between two questions whether the server is ready
CONTROL_TIMEOUT_S = 60.0  # for requests that are answered at once
FLUSH_TIMEOUT_S = 10  # that a server may take to become idle
EXCERPT = 500  # characters of an answer that an error shows


def http_client() -> httpx.AsyncClient:
    """Connections to engines, with the API key of the environment if there is one."""
    key = api_key_from_environment()
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        trust_env=False,  # the environment's proxy is for the outside world
        # `EngineClient` bounds each request as a whole.
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        # None is kept: one that the server closes between two steps would look like a crash.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    )


class EngineClient:
    """Requests to one server. Each is bounded in time and fails with a `RapoError`.

    Args:
        http: where connections come from; shared by the clients of a pool.
        url: the server's address, http://HOST:PORT.
        timeout: seconds for the answer to one `generate` or `update_weights_from_disk`.
        diagnose: asked for the reason when the connection fails.
    """

    def __init__(
        self, http: httpx.AsyncClient, url: str, *, timeout: float, diagnose: Diagnose | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self._http = http
        self._timeout = timeout
        self._diagnose = diagnose

    async def until_healthy(self, timeout: float) -> None:
        """Waits until the server is ready, `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        while problem := await self._health_problem(deadline - time.monotonic()):
            if self._diagnose and (reason := self._diagnose(self.url)):
                raise RapoError(f"{self.url} did not become ready: {reason}")
            if time.monotonic() > deadline:
                raise RapoError(
                    f"{self.url} was not ready within {timeout:g} s ({problem}); look into the server's log, "
                    "or raise rollout.startup_timeout_s"
                )
            await asyncio.sleep(POLL_S)

    async def _health_problem(self, remaining: float) -> str | None:
        patience = max(POLL_S, min(HEALTH_TIMEOUT_S, remaining))
        try:
            response = await self._http.get(f"{self.url}/health", timeout=patience)
        except httpx.HTTPError as error:
            return _named(error)
        return None if response.status_code == 200 else f"status {response.status_code}"

    async def weight_version(self) -> str:
        """The version of the weights that the server has now, as it spells it."""
        info = await self._json("GET", "/model_info", timeout=CONTROL_TIMEOUT_S)
        try:
            return str(info["weight_version"])
        except (KeyError, TypeError):
            raise self._malformed("/model_info", "no weight_version", info) from None

    async def generate(
        self, input_ids: Sequence[Sequence[int]], sampling_params: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """One response a prompt, in order, with log-probs: SGLang's answers as they are.

        Args:
            input_ids: the prompts' token ids.
            sampling_params: one for each prompt.
        """
        body = {"input_ids": input_ids, "sampling_params": sampling_params, "return_logprob": True}
        answers = await self._json("POST", "/generate", body, timeout=self._timeout)
        if not isinstance(answers, list) or len(answers) != len(input_ids):
            raise self._malformed("/generate", f"not a list of {len(input_ids)} responses", answers)
        return answers

    async def update_weights_from_disk(self, model_path: Path, weight_version: str) -> None:
        """Loads the safetensors checkpoint in `model_path`, a folder that the server can read.

        Generation pauses and the cache is flushed first: an update that itself flushes the cache just after
        a request has ended can kill SGLang 0.5.21.
        """
        body = {
            "model_path": str(model_path.resolve()),
            "weight_version": weight_version,
            "flush_cache": False,
            "abort_all_requests": False,
        }
        await self._request("POST", "/pause_generation", {"mode": "retract"}, timeout=CONTROL_TIMEOUT_S)
        try:
            flush = f"/flush_cache?timeout={FLUSH_TIMEOUT_S}"
            await self._request("POST", flush, {}, timeout=CONTROL_TIMEOUT_S + FLUSH_TIMEOUT_S)
            result = await self._json("POST", "/update_weights_from_disk", body, timeout=self._timeout)
        except RapoError:
            with suppress(RapoError):  # this failure is the one to report, even if the server is gone by now
                await self._continue()
            raise
        await self._continue()
        if not isinstance(result, dict) or result.get("success") is not True:
            raise self._malformed("/update_weights_from_disk", "no success", result)

    async def _continue(self) -> None:
        await self._request("POST", "/continue_generation", {}, timeout=CONTROL_TIMEOUT_S)

    async def _json(self, method: str, path: str, body: Any = None, *, timeout: float) -> Any:
        response = await self._request(method, path, body, timeout=timeout)
        try:
            return response.json()
        except ValueError:
            raise self._malformed(path, "not JSON", response.text) from None

    async def _request(self, method: str, path: str, body: Any, *, timeout: float) -> httpx.Response:
        what = f"{method} {self.url}{path}"
        try:
            async with asyncio.timeout(timeout):  # httpx bounds the pauses between bytes, not the whole
                response = await self._http.request(method, self.url + path, json=body)
        except TimeoutError:
            raise self._failure(
                f"{what} was not answered within {timeout:g} s",
                "raise rollout.request_timeout_s, or ask for less at once (rollout.prompts_per_request)",
            ) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._failure(
                f"{what}: cannot connect ({_named(error)})",
                "check that the server runs and that the address is right",
            ) from error
        except httpx.HTTPError as error:
            raise self._failure(
                f"{what}: the connection was lost ({_named(error)})", "look into the server's log"
            ) from error
        if response.status_code == 401:
            raise RapoError(
                f"{what} answered 401: the server demands an API key; set {API_KEY_VARIABLE} to it"
            )
        if response.status_code != 200:
            raise RapoError(
                f"{what} answered status {response.status_code}: {_excerpt(response.text)}; "
                "the reason stands in the answer or in the server's log"
            )
        return response

    def _failure(self, what: str, remedy: str) -> RapoError:
        reason = self._diagnose(self.url) if self._diagnose else None
        return RapoError(f"{what}; {reason or remedy}")

    def _malformed(self, path: str, what: str, answer: Any) -> RapoError:
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return RapoError(
            f"{self.url}{path} answered {what}: {_excerpt(text)}; is this an SGLang server, 0.5.14 or later?"
        )


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _excerpt(text: str) -> str:
    return text if len(text) <= EXCERPT else f"{text[:EXCERPT]}… ({len(text)} characters)"
