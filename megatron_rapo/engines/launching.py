"""How each kind of engine is started as a process of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SAFE_PATH = "-P"
"""Of an interpreter that runs a module: what lies in the working directory is not imported as a library."""
SAFE_PATH_VARIABLE = {"PYTHONSAFEPATH": "1"}
"""The same of an interpreter of any version, which may not know the argument."""


@dataclass(frozen=True)
class Launch:
    """One server's process.

    Attributes:
        arguments: the command line.
        inherited_socket: file descriptor of a listening socket that the process takes over; None where it
            binds its port itself, which another process can take before.
        environment: variables beside those of this process.
    """

    arguments: Sequence[str]
    inherited_socket: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Launcher(Protocol):
    """A kind of engine. Its processes must end when this process ends, however it does."""

    @property
    def name(self) -> str:
        """What errors call one: `embedded server`."""

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        """Server `number` (from 0) on this port of loopback, which the socket listens on."""
