"""One tool process, seen from the environment's event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rapo.errors import RapoError
from megatron_rapo.processes.interpreter import end_process, start_interpreter
from megatron_rapo.tools import frames
from megatron_rapo.tools.disk import MOST_ENTRIES, is_larger, outgrown
from megatron_rapo.tools.outcome import CallOutcome, Reply
from megatron_rapo.tools.plan import Plan
from megatron_rapo.tools.worker import STARTUP_LIMIT_S

_OUTPUT = ".output"  # in the folder of the process: what it printed past the functions
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")  # variables of a clean environment
_REMOVE_LIMIT_S = 60.0

logger = logging.getLogger(__name__)


class ToolProcess:
    """A process that serves one call at a time. It ends when this object is closed, or its owner dies."""

    def __init__(self, plan: Plan) -> None:
        """Starts it; `ready` waits until it may be called."""
        self._plan = plan
        self._folder = Path(tempfile.mkdtemp(prefix=f"megatron-rapo-tool-{os.getpid()}-"))
        self._ours, theirs = socket.socketpair()
        with theirs:
            self._process = start_interpreter(
                "megatron_rapo.tools.worker",
                [plan.to_json()],
                theirs.fileno(),
                code=plan.code,
                environment=_environment(self._folder, clean=plan.runs_code),
                folder=self._folder,
                output=self._folder / _OUTPUT,
            )
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._outgrown = False

    @property
    def alive(self) -> bool:
        """Whether it can take further calls."""
        return self._writer is not None

    async def ready(self) -> None:
        """Waits until it has imported its functions.

        Raises:
            RapoError: it cannot, or cannot be confined.
        """
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._ours)
        try:
            async with asyncio.timeout(STARTUP_LIMIT_S):
                said = await frames.read_reply(self._reader)
        except (TimeoutError, ValueError, asyncio.IncompleteReadError, ConnectionError) as error:
            printed = self._printed()
            status = self.close()
            raise RapoError(
                f"the process of the tools {', '.join(self._plan.functions)} did not start (status {status}, "
                f"{error!r}); it printed:\n{printed}"
            ) from error
        if "failed" in said:
            self.close()
            raise RapoError(str(said["failed"]))

    async def call(self, function: str, arguments: Mapping[str, Any]) -> Reply:
        """What the function makes of the arguments. After a timeout, or want of memory, it is closed."""
        assert self._reader is not None and self._writer is not None
        watch = asyncio.create_task(self._watch())
        try:
            self._writer.write(frames.request(function, dict(arguments)))
            async with asyncio.timeout(self._plan.limits.call_s):
                await self._writer.drain()
                said = await frames.read_reply(self._reader)
            reply = Reply(
                CallOutcome(said["outcome"]),
                said.get("value"),
                str(said.get("why", "")),
                said.get("cut") is True,
            )
        except TimeoutError:
            self.close()
            return Reply(CallOutcome.TIMEOUT, why=f"not done within {self._plan.limits.call_s:g} s")
        except (ValueError, KeyError, RecursionError, asyncio.IncompleteReadError, ConnectionError) as error:
            return await self._died(error)
        except BaseException:  # whoever asked gave up: what it says later is no answer to another
            self.close()
            raise
        finally:
            watch.cancel()
        if reply.outcome is CallOutcome.RAISED:
            logger.info("%s raised:\n%s", function, said.get("trace"))
        if reply.outcome is CallOutcome.OUT_OF_MEMORY:
            self.close()
            return Reply(
                reply.outcome, why=f"it needs more than {self._plan.limits.memory_gib:g} GiB of memory"
            )
        if is_larger(self._folder, self._process.pid, self._most_bytes):
            self.close()
            return self._too_large()
        return reply

    def close(self) -> int:
        """Ends the process, and removes its folder; its status."""
        if self._writer is not None:
            self._writer.close()
            self._reader = self._writer = None
        else:
            self._ours.close()
        status = end_process(self._process)
        # In a thread, as what the policy's code left may take seconds; it goes on past the end of the loop.
        threading.Thread(target=_remove, args=[self._folder], name="tool folder").start()
        return status

    @property
    def _most_bytes(self) -> int:
        return self._plan.limits.file_mib * 2**20

    async def _watch(self) -> None:
        """Ends a process that outgrows its folder, in the middle of a call."""
        await outgrown(self._folder, self._process.pid, self._most_bytes)
        self._outgrown = True
        await asyncio.to_thread(end_process, self._process)

    def _too_large(self) -> Reply:
        limit = self._plan.limits.file_mib
        return Reply(
            CallOutcome.DIED, why=f"its files are more than {limit} MiB or {MOST_ENTRIES:,}, or too deep"
        )

    async def _died(self, error: Exception) -> Reply:
        try:
            status: int | None = await asyncio.to_thread(self._process.wait, 1.0)
        except subprocess.TimeoutExpired:  # it lives, but says what is no reply
            status = None
        printed = self._printed()
        self.close()
        if self._outgrown:
            return self._too_large()
        if status == -signal.SIGXCPU:
            return Reply(CallOutcome.TIMEOUT, why=f"more than {self._plan.limits.cpu_s} s of CPU")
        logger.info("a tool's process ended with status %s (%r); it printed: %s", status, error, printed)
        told = (
            "its process said what is no reply"
            if status is None
            else f"its process ended with status {status}"
        )
        return Reply(CallOutcome.DIED, why=told)

    def _printed(self) -> str:
        """The end of what it printed."""
        try:
            with (self._folder / _OUTPUT).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
                return file.read().decode(errors="replace")
        except OSError:
            return ""


async def started(plan: Plan) -> ToolProcess:
    """A process that may be called.

    Raises:
        RapoError: it cannot start.
    """
    process = ToolProcess(plan)
    try:
        await process.ready()
    except BaseException:
        process.close()
        raise
    return process


def _remove(folder: Path) -> None:
    """Unlike `shutil.rmtree` it removes folders of any depth."""
    subprocess.run(["rm", "-rf", "--", folder], timeout=_REMOVE_LIMIT_S, check=False)


def _environment(folder: Path, *, clean: bool) -> dict[str, str]:
    """Variables of the process: what is temporary lies in its folder, and libraries start one thread."""
    kept = {name: value for name, value in os.environ.items() if not clean or name in _KEPT}
    own = {"HOME": str(folder)} if clean else {}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**kept, **own, **threads, "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
