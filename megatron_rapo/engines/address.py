"""Which server an address names."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

_PORTS = {"http": 80, "https": 443}
_THIS_MACHINE = ("localhost", "127.0.0.1", "0.0.0.0")


def server_of(url: str) -> tuple[str, int, str]:
    """Host, port and path: the same for two ways to write one address.

    A host's name and its number are two servers here: what a name means is known only where it is used.

    Raises:
        ValueError: it is not http://HOST:PORT or the like.
    """
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is not an address; write http://HOST:PORT")
    try:
        port = parts.port or _PORTS[parts.scheme]
    except ValueError as error:
        raise ValueError(f"{url!r} is not an address: {error}; write http://HOST:PORT") from None
    host = "127.0.0.1" if parts.hostname in _THIS_MACHINE else parts.hostname
    return host, port, parts.path.rstrip("/")


def same_server(urls: Sequence[str]) -> tuple[str, str] | None:
    """Two of these addresses that name one server; None if all differ."""
    seen: dict[tuple[str, int, str], str] = {}
    for url in urls:
        if (server := server_of(url)) in seen:
            return seen[server], url
        seen[server] = url
    return None
