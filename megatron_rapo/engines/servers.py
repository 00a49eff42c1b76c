"""Engines as processes of the run on this machine: started, watched, restarted, ended."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import psutil

from megatron_rapo.engines.engine import Connect
from megatron_rapo.engines.exchange import http_client
from megatron_rapo.engines.launching import Launcher
from megatron_rapo.errors import RapoError

EXIT_WAIT_S = 1.0  # a lost connection is seen sooner than the exit that caused it
TERMINATE_WAIT_S = 5.0  # from the request to end to the kill
LOG_LINES = 15  # of the log in an error
LOG_WIDTH = 300  # characters of each; SGLang writes all its options in one line
PORTS = 3  # tried before a server that finds its port taken is given up

# As Python, uvicorn and SGLang word it.
_PORT_TAKEN = re.compile(r"address already in use|port \d+ is (already in use|not available)", re.I)
_OF_A_RANK = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+|CUDA_DEVICE_MAX_CONNECTIONS"
)


@dataclass(frozen=True)
class _Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int  # bytes of the log that are of servers before


class LocalServers:
    """Servers on this machine for as long as the `with` block lasts, ready when it begins.

    They end with it, and by themselves should this process die without ending them.

    Args:
        launcher: how one is started.
        connect: makes what speaks to one.
        count: how many.
        log_directory: where engine-0.log, engine-1.log, … go; made if need be.
        startup_timeout: seconds in which they must be ready.

    Raises:
        RapoError: on entering, if one ended or was not ready in time.
    """

    def __init__(
        self, launcher: Launcher, connect: Connect, *, count: int, log_directory: Path, startup_timeout: float
    ) -> None:
        self._launcher = launcher
        self._connect = connect
        self._count = count
        self._log_directory = log_directory
        self._startup_timeout = startup_timeout
        self._servers: dict[int, _Server] = {}

    @property
    def urls(self) -> list[str]:
        """The servers' addresses, by number. One that is restarted has another address."""
        return [server.url for _, server in sorted(self._servers.items())]

    def __enter__(self) -> Self:
        self._log_directory.mkdir(parents=True, exist_ok=True)
        try:
            asyncio.run(self._start_all())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def diagnose(self, url: str) -> str | None:
        """How the server at this address ended, with the last lines of its log; None while it runs."""
        server = next((server for server in self._servers.values() if server.url == url), None)
        if server is None:
            return None
        try:
            code = server.process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with server.log.open(errors="replace") as lines:
            tail = "\n".join(line.rstrip()[:LOG_WIDTH] for line in deque(lines, LOG_LINES))
        return f"the {self._launcher.name} {how}; its log {server.log} ends with:\n{tail}"

    async def restart(self, number: int) -> str:
        """Ends server `number`, also one that hangs, and starts it anew. Returns its new address.

        Raises:
            RapoError: it ended again, or was not ready in time.
        """
        await asyncio.to_thread(_end, [self._servers[number].process])
        return await self._start(number)

    async def _start_all(self) -> None:
        starts = [asyncio.ensure_future(self._start(number)) for number in range(self._count)]
        try:
            await asyncio.gather(*starts)
        finally:
            for start in starts:
                start.cancel()

    async def _start(self, number: int) -> str:
        for remaining in reversed(range(PORTS)):
            server = self._servers[number] = self._spawn(number)
            try:
                async with http_client() as http:
                    client = self._connect(
                        http, server.url, timeout=self._startup_timeout, diagnose=self.diagnose
                    )
                    await client.until_healthy(self._startup_timeout)
                if await asyncio.to_thread(_listens, server):
                    return server.url
                await asyncio.to_thread(_end, [server.process])
                problem = RapoError(f"What answers at {server.url} is no process of this run")
            except RapoError as error:
                if not _port_was_taken(server):
                    raise
                problem = error
            if not remaining:
                raise RapoError(
                    f"{self._launcher.name} {number} found its port taken by another process, {PORTS} "
                    f"times; see what listens on this machine (ss -ltnp). {problem}"
                ) from problem
        raise AssertionError("unreachable")

    def _spawn(self, number: int) -> _Server:
        log = self._log_directory / f"engine-{number}.log"
        # The port is known before the server runs. One that inherits the socket cannot lose it.
        with socket.create_server(("127.0.0.1", 0)) as listening, log.open("ab") as output:
            port = listening.getsockname()[1]
            launch = self._launcher.launch(number, port, listening.fileno())
            inherited = [] if launch.inherited_socket is None else [launch.inherited_socket]
            if not inherited:
                listening.close()
            try:
                process = subprocess.Popen(
                    launch.arguments,
                    pass_fds=inherited,
                    env={**_environment(), **launch.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches the trainer alone, which ends them in order
                )
            except OSError as error:
                raise RapoError(
                    f"cannot start {self._launcher.name} {number}: {launch.arguments[0]}: {error.strerror}"
                ) from error
            return _Server(f"http://127.0.0.1:{port}", process, log, output.tell())

    def _stop(self) -> None:
        _end([server.process for server in self._servers.values()])
        self._servers.clear()


def _environment() -> dict[str, str]:
    """This process's, without what makes it a rank: SGLang would wait for peers in the trainer's store."""
    return {name: value for name, value in os.environ.items() if not _OF_A_RANK.fullmatch(name)}


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Asks all to end, and kills those that do not."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + TERMINATE_WAIT_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(server: _Server) -> bool:
    """Whether it is this server, or one that it started, that listens on its port, and no other's engine."""
    port = urlsplit(server.url).port
    with suppress(psutil.NoSuchProcess):
        top = psutil.Process(server.process.pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                for found in process.net_connections("tcp"):
                    if found.status == psutil.CONN_LISTEN and found.laddr.port == port:
                        return True
    return False


def _port_was_taken(server: _Server) -> bool:
    """Whether that is what a server that has ended said."""
    if server.process.poll() is None:
        return False
    with server.log.open("rb") as log:
        log.seek(server.log_start)
        return bool(_PORT_TAKEN.search(log.read().decode(errors="replace")))
