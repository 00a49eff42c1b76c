"""Who may speak to a vLLM server: vLLM asks for a key at some of its routes alone (0.32: not for weights)."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from megatron_rapo.wire.access import API_KEY_VARIABLE, api_key_from_environment, is_loopback

Application = Callable[[dict[str, Any], Any, Callable[[dict[str, Any]], Awaitable[None]]], Awaitable[None]]


class Guard:
    """An ASGI middleware: the key of the environment before each route but /health.

    Without a key, requests of this machine alone are answered.
    """

    def __init__(self, app: Application) -> None:
        self._app = app
        self._key = api_key_from_environment()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self._app(scope, receive, send)
        if self._key is None:
            client = scope.get("client")
            if client is None or is_loopback(client[0]):
                return await self._app(scope, receive, send)
            return await _refuse(send, f"set {API_KEY_VARIABLE} at the server: it is asked from elsewhere")
        given = dict(scope["headers"]).get(b"authorization", b"")
        if secrets.compare_digest(given, f"Bearer {self._key}".encode()):
            return await self._app(scope, receive, send)
        return await _refuse(send, f"the key of {API_KEY_VARIABLE} is needed")


async def _refuse(send: Callable[[dict[str, Any]], Awaitable[None]], reason: str) -> None:
    body = json.dumps({"error": {"message": reason, "code": 401}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
