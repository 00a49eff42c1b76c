"""Ports for servers that bind theirs themselves, while other tests run beside."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

# Below those that Linux gives to connections by itself (net.ipv4.ip_local_port_range): one of those
# could be taken between here and the server's start.
_FIRST, _LAST = 12_000, 31_999


def free_port() -> int:
    """A port that nothing listens on."""
    choose = random.SystemRandom()  # not seeded: tests that run beside each other choose others
    while True:
        port = choose.randint(_FIRST, _LAST)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def free_ports(count: int) -> list[int]:
    """Different ones."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)
