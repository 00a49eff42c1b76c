"""Processes that several episodes share."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from megatron_rapo.tools.outcome import Reply
from megatron_rapo.tools.plan import Plan
from megatron_rapo.tools.process import ToolProcess, started


class Workers:
    """Processes for functions without state: at most so many, started when they are needed.

    Attributes:
        plan: of each process.
    """

    def __init__(self, plan: Plan, most: int) -> None:
        self.plan = plan
        self._most = most
        self._idle: list[ToolProcess] = []
        self._free: asyncio.Semaphore | None = None

    async def call(self, function: str, arguments: Mapping[str, Any]) -> Reply:
        """What a process makes of the call, once one is free.

        Raises:
            RapoError: a process cannot start.
        """
        self._free = self._free or asyncio.Semaphore(self._most)
        async with self._free:
            idle = self._idle
            process = idle.pop() if idle else await started(self.plan)
            try:
                return await process.call(function, arguments)
            finally:
                if process.alive and idle is self._idle:
                    idle.append(process)
                elif process.alive:  # all were closed meanwhile
                    process.close()

    def close(self) -> None:
        """Ends all. It must be called where they served: in the event loop."""
        idle, self._idle, self._free = self._idle, [], None
        for process in idle:
            process.close()
