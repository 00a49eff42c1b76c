"""What is said between a tool's process and the one that started it: frames of a length and as many bytes.

Requests are pickled, since they come from whom the process trusts. Replies are JSON: the process may run what
the policy wrote, and to unpickle that would be to run it here.
"""

from __future__ import annotations

import json
import pickle
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import asyncio

MAX_BYTES = 4 * 2**20
"""Of a reply."""

_LENGTH = struct.Struct("!I")


def request(function: str, arguments: dict[str, Any]) -> bytes:
    """The frame that asks for a call."""
    return _framed(pickle.dumps((function, arguments)))


def read_request(stream: BinaryIO) -> tuple[str, dict[str, Any]]:
    """The next call that is asked for.

    Raises:
        EOFError: there is none, as the other end is closed.
    """
    [length] = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    return pickle.loads(_exactly(stream, length))


def reply(**values: Any) -> bytes:
    """The frame that answers.

    Raises:
        ValueError: a value cannot be written in JSON, or is too long.
        TypeError: a value cannot be written in JSON.
    """
    body = json.dumps(values).encode()
    if len(body) > MAX_BYTES:
        raise ValueError(f"{len(body):,} bytes of JSON are too many")
    return _framed(body)


async def read_reply(stream: asyncio.StreamReader) -> dict[str, Any]:
    """The next answer.

    Raises:
        asyncio.IncompleteReadError: there is none, as the other end is closed.
        ValueError: it is no answer.
    """
    [length] = _LENGTH.unpack(await stream.readexactly(_LENGTH.size))
    if length > MAX_BYTES:
        raise ValueError(f"a reply of {length:,} bytes")
    values = json.loads(await stream.readexactly(length))
    if not isinstance(values, dict):
        raise ValueError("a reply that is no table")
    return values


def _framed(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def _exactly(stream: BinaryIO, count: int) -> bytes:
    body = stream.read(count)
    if len(body) < count:
        raise EOFError
    return body
