"""The processes of a program, among which episodes are shared."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping
from typing import Any

from megatron_rapo.agents.plan import Plan
from megatron_rapo.agents.process import AgentProcess, started
from megatron_rapo.background import BackgroundLoop


class AgentProcesses:
    """So many processes, each started when an episode is its turn to play; one that ended is started anew.

    None of them has a limit of episodes: engines that serve one request at a time wait until all episodes of
    a rollout have asked.
    """

    def __init__(self, plan: Plan, count: int) -> None:
        self._plan = plan
        self._places: list[_Place] = [_Place(plan) for _ in range(count)]

    async def play(self, episode: Mapping[str, Any]) -> Any:
        """What the program says came of the episode.

        Raises:
            RapoError: the program cannot be loaded.
            ProgramFault: it raised, or its process ended.
        """
        place = min(self._places, key=lambda place: place.episodes)
        place.episodes += 1
        try:
            return await (await place.process()).play(episode)
        finally:
            place.episodes -= 1

    async def aclose(self) -> None:
        """Ends all."""
        await asyncio.gather(*(place.aclose() for place in self._places))


class _Place:
    """Where one process runs at a time."""

    def __init__(self, plan: Plan) -> None:
        self.episodes = 0
        self._plan = plan
        self._process: AgentProcess | None = None
        self._starting = asyncio.Lock()

    async def process(self) -> AgentProcess:
        async with self._starting:
            if self._process is not None and not self._process.alive:
                await self.aclose()
            self._process = self._process or await started(self._plan)
            return self._process

    async def aclose(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.aclose()


@functools.cache
def check_program(plan: Plan) -> None:
    """Loads the program in a process of its own, and ends it; once a process, as it may take long.

    Raises:
        RapoError: it cannot be loaded.
    """
    loop = BackgroundLoop("programs")  # whoever asks may have a loop that runs
    try:
        loop.run(_start_and_end(plan))
    finally:
        loop.close()


async def _start_and_end(plan: Plan) -> None:
    await (await started(plan)).aclose()
