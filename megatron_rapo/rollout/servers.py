"""Embedded servers as processes of the run: started, watched, ended."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_rapo.rollout.client import EngineClient, http_client

EXIT_WAIT_S = 1.0  # a lost connection is seen sooner than the exit that caused it
TERMINATE_WAIT_S = 5.0  # from the request to end to the kill
LOG_LINES = 15  # of the log in an error


@dataclass(frozen=True)
class _Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path


class EmbeddedServers:
    """Servers on this machine for as long as the `with` block lasts, ready when it begins.

    They end with it, and by themselves should this process die without ending them.

    Args:
        model_path: HF folder that each serves at first.
        count: how many.
        device: `cpu` or `cuda`.
        dtype: `bfloat16` or `float32`.
        threads: CPU threads of each.
        log_directory: where engine-0.log, engine-1.log, … go; made if need be.
        startup_timeout: seconds in which they must be ready.

    Raises:
        RapoError: on entering, if one ended or was not ready in time.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        count: int,
        device: str,
        dtype: str,
        threads: int,
        log_directory: Path,
        startup_timeout: float,
    ) -> None:
        self._options = [
            "--model",
            str(model_path),
            "--device",
            device,
            "--dtype",
            dtype,
            "--threads",
            str(threads),
        ]
        self._count = count
        self._log_directory = log_directory
        self._startup_timeout = startup_timeout
        self._servers: dict[str, _Server] = {}

    @property
    def urls(self) -> list[str]:
        """The servers' addresses."""
        return list(self._servers)

    def __enter__(self) -> Self:
        self._log_directory.mkdir(parents=True, exist_ok=True)
        try:
            for number in range(self._count):
                server = self._start(self._log_directory / f"engine-{number}.log")
                self._servers[server.url] = server
            asyncio.run(self._until_healthy())
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
        server = self._servers.get(url)
        if server is None:
            return None
        try:
            code = server.process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        with server.log.open(errors="replace") as lines:
            tail = "".join(deque(lines, LOG_LINES)).rstrip()
        return f"the embedded server {how}; its log {server.log} ends with:\n{tail}"

    def _start(self, log: Path) -> _Server:
        # The socket is bound here and inherited: its port is known at once and nobody else can take it.
        with socket.create_server(("127.0.0.1", 0)) as listening, log.open("ab") as output:
            inherited = ["--socket-fd", str(listening.fileno()), "--parent-pid", str(os.getpid())]
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_rapo.rollout.embedded", *self._options, *inherited],
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the trainer alone, which ends its servers in order
            )
            return _Server(f"http://127.0.0.1:{listening.getsockname()[1]}", process, log)

    async def _until_healthy(self) -> None:
        async with http_client() as http:
            for url in self.urls:
                client = EngineClient(http, url, timeout=self._startup_timeout, diagnose=self.diagnose)
                await client.until_healthy(self._startup_timeout)

    def _stop(self) -> None:
        processes = [server.process for server in self._servers.values()]
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(TERMINATE_WAIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._servers.clear()
