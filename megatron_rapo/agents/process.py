"""One process of a program, seen from the environments' event loop."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from megatron_rapo.agents.plan import Plan
from megatron_rapo.errors import RapoError
from megatron_rapo.processes import keeper
from megatron_rapo.processes.interpreter import end_process

STARTUP_LIMIT_S = 300.0
"""Seconds in which a program must be loaded; generous, for cold network file systems."""
CANCEL_LIMIT_S = 10.0
"""Seconds in which a program must let go of an episode that is given up; else its process is killed."""
_LONGEST_LINE = 2**24  # bytes of an answer

logger = logging.getLogger(__name__)


class ProgramFault(Exception):
    """What a program did instead of playing the episode: its reward is unknown."""


class AgentProcess:
    """Plays any number of episodes at a time; it ends when this object is closed, or its owner dies."""

    def __init__(self, plan: Plan) -> None:
        """Starts it; `ready` waits until it has loaded the program."""
        self._plan = plan
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._given_up: dict[int, asyncio.TimerHandle] = {}
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ours, theirs = socket.socketpair()
        with theirs:
            descriptor = str(theirs.fileno())
            self._keeper = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    keeper.__file__,
                    descriptor,
                    str(plan.grace_s),
                    *plan.command,
                    descriptor,
                ],
                stdin=subprocess.PIPE,  # held open for as long as it may run
                pass_fds=[theirs.fileno()],
                env=plan.environment,
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether it takes further episodes."""
        return self._reading is not None and not self._reading.done()

    @property
    def episodes(self) -> int:
        """That it plays now."""
        return len(self._waiting)

    async def ready(self) -> None:
        """Waits until it has loaded the program.

        Raises:
            RapoError: it cannot.
        """
        reader, self._writer = await asyncio.open_unix_connection(sock=self._ours, limit=_LONGEST_LINE)
        option = f'{self._plan.option} = "{self._plan.address}"'
        try:
            async with asyncio.timeout(STARTUP_LIMIT_S):
                self._writer.write(self._plan.first_line)
                told = json.loads(await reader.readline())
        except (TimeoutError, ValueError, ConnectionError) as error:
            status = await self.aclose()
            raise RapoError(
                f"{option}: {self._plan.python} did not start it (status {status}, {error!r}); what it "
                "printed stands above"
            ) from error
        if "failed" in told:
            await self.aclose()
            raise RapoError(
                f"{option} cannot be loaded by {self._plan.python}; mend it, or install what it needs:\n"
                f"{told['failed']}"
            )
        self._reading = asyncio.create_task(self._read(reader))

    async def play(self, episode: Mapping[str, Any]) -> Any:
        """What the program says came of the episode, as JSON has it.

        Raises:
            ProgramFault: it raised, or its process ended.
        """
        if not self.alive:
            raise ProgramFault(f"{self._plan.address}: its process has ended")
        number = next(self._numbers)
        self._waiting[number] = answer = asyncio.get_running_loop().create_future()
        self._send({"number": number, "episode": dict(episode)})
        try:
            return await answer
        except asyncio.CancelledError:
            self._give_up(number)
            raise
        finally:
            self._waiting.pop(number, None)

    async def aclose(self) -> int:
        """Ends the process, and all that it started; its status."""
        for timer in self._given_up.values():
            timer.cancel()
        if self._writer is not None:
            self._writer.close()
        else:
            self._ours.close()
        self._end()
        try:
            status = await asyncio.to_thread(self._keeper.wait, self._plan.grace_s + keeper.KILL_LIMIT_S)
        except subprocess.TimeoutExpired:  # the machine is stuck
            status = end_process(self._keeper)
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)
        return status

    def _give_up(self, number: int) -> None:
        """Has the program let go of the episode; a process that does not is stuck, and killed."""
        if not self.alive:
            return
        self._send({"number": number})
        loop = asyncio.get_running_loop()
        self._given_up[number] = loop.call_later(CANCEL_LIMIT_S, self._kill)

    def _kill(self) -> None:
        logger.warning("a program's process did not let go of an episode for %g s: killed", CANCEL_LIMIT_S)
        end_process(self._keeper)

    def _end(self) -> None:
        """The keeper ends it, and all that it started, within its grace."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()

    def _send(self, told: Mapping[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(told, default=str).encode() + b"\n")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Hands answers out, until the process ends."""
        why = "it was closed"
        try:
            with suppress(ConnectionError):  # a process that ends with something unread resets it
                while line := await reader.readline():
                    self._take(json.loads(line))
            self._end()
            status = await asyncio.to_thread(self._keeper.wait)
            why = f"its process ended with status {status}; what it printed stands above"
        except (ValueError, KeyError) as error:
            why = f"its process said what is no answer: {error!r}"
            self._end()
        finally:
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(ProgramFault(f"{self._plan.address}: {why}"))

    def _take(self, told: Mapping[str, Any]) -> None:
        if (timer := self._given_up.pop(told["number"], None)) is not None:
            timer.cancel()
        answer = self._waiting.get(told["number"])
        if answer is not None and not answer.done():
            self._hand_out(answer, told)

    def _hand_out(self, answer: asyncio.Future[Any], told: Mapping[str, Any]) -> None:
        if "raised" in told:
            fault = ProgramFault(f"{self._plan.address} raised {told['raised']}")
            fault.add_note(told["trace"])
            answer.set_exception(fault)
        elif "cancelled" in told:
            answer.set_exception(ProgramFault(f"{self._plan.address} cancelled the episode's task"))
        else:
            answer.set_result(told["result"])


async def started(plan: Plan) -> AgentProcess:
    """A process that has loaded the program.

    Raises:
        RapoError: it cannot.
    """
    process = AgentProcess(plan)
    try:
        await process.ready()
    except asyncio.CancelledError:
        await process.aclose()
        raise
    return process
