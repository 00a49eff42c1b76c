"""How each kind of engine is started as a process of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


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


@dataclass(frozen=True)
class EmbeddedLauncher:
    """The embedded server. It inherits its socket, and watches this process by itself."""

    model_path: Path
    device: str
    dtype: str
    threads: int
    name: str = "embedded server"

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        arguments = [sys.executable, "-m", "megatron_rapo.rollout.embedded"]
        arguments += ["--model", str(self.model_path), "--device", self.device, "--dtype", self.dtype]
        arguments += ["--threads", str(self.threads)]
        arguments += ["--socket-fd", str(socket_fd), "--parent-pid", str(os.getpid())]
        return Launch(arguments, inherited_socket=socket_fd)


@dataclass(frozen=True)
class SGLangLauncher:
    """An SGLang server, from an environment of its own, tied to this process (`rollout.tether`).

    Attributes:
        python: interpreter of the environment that SGLang is installed in.
        gpus: `[servers × tensor_parallel]`, a slice for each server; None leaves the choice to SGLang.
        arguments: further ones of sglang.launch_server.
    """

    model_path: Path
    dtype: str
    python: str
    tensor_parallel: int
    gpus: Sequence[int] | None
    arguments: Sequence[str]
    name: str = "SGLang server"

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        tether = [sys.executable, "-m", "megatron_rapo.rollout.tether", str(os.getpid())]
        command = [self.python, "-m", "sglang.launch_server", "--model-path", str(self.model_path)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", self.dtype]
        command += ["--tp-size", str(self.tensor_parallel), *self.arguments]
        environment = {}
        if self.gpus is not None:
            mine = self.gpus[number * self.tensor_parallel :][: self.tensor_parallel]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        return Launch([*tether, *command], environment=environment)
