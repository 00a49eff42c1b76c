"""The tools of an environment: their processes, and what becomes of the policy's calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rapo.tools.described import BadArguments, Tool
from megatron_rapo.tools.outcome import CallOutcome, Reply
from megatron_rapo.tools.plan import Limits, Plan
from megatron_rapo.tools.process import ToolProcess, started
from megatron_rapo.tools.workers import Workers


@dataclass(frozen=True)
class Answer:
    """What the policy is told of one call.

    Attributes:
        lost: whether the state that the function kept is gone.
    """

    outcome: CallOutcome
    text: str
    lost: bool = False


class Toolbox:
    """Tools of one environment object, for many episodes at a time."""

    def __init__(self, tools: Sequence[Tool], limits: Limits, *, code: Sequence[Path], workers: int) -> None:
        """
        Args:
            tools: that may be called.
            limits: of each call and process.
            code: folders with the user's own modules.
            workers: processes for tools without state.
        """
        self._tools = {tool.name: tool for tool in tools}
        self._limits = limits
        self._plans = {
            tool.name: Plan(
                {tool.name: tool.address},
                limits,
                code=() if tool.runs_code else code,
                keeps_state=True,
                runs_code=tool.runs_code,
            )
            for tool in tools
            if tool.keeps_state
        }
        shared = {tool.name: tool.address for tool in tools if not tool.keeps_state}
        self._workers = Workers(Plan(shared, limits, code), workers)

    @property
    def plans(self) -> list[Plan]:
        """Of each kind of process that episodes will start."""
        return [*self._plans.values(), *([self._workers.plan] if self._workers.plan.functions else [])]

    @asynccontextmanager
    async def episode(self) -> AsyncIterator[EpisodeTools]:
        """The tools of one episode, whose own processes end with it."""
        tools = EpisodeTools(self._tools, self._limits, self._plans, self._workers)
        try:
            yield tools
        finally:
            tools.close()

    async def aclose(self) -> None:
        """Ends the processes of tools without state; a later call starts new ones, in whatever event loop."""
        self._workers.close()


class EpisodeTools:
    """Answers the calls of one episode."""

    def __init__(
        self, tools: Mapping[str, Tool], limits: Limits, plans: Mapping[str, Plan], workers: Workers
    ) -> None:
        """
        Args:
            tools: by name.
            limits: of each call.
            plans: of the tools that keep their state, by name.
            workers: for the others.
        """
        self._tools = tools
        self._limits = limits
        self._plans = plans
        self._workers = workers
        self._own: dict[str, ToolProcess] = {}
        self._turn = asyncio.Lock()  # a process that keeps state has one call at a time

    async def call(self, name: str, arguments: object) -> Answer:
        """What a call comes to.

        Raises:
            RapoError: a process cannot start.
        """
        tool = self._tools.get(name)
        if tool is None:
            there = ", ".join(self._tools)
            return refusal(CallOutcome.UNKNOWN_TOOL, f"there is no tool {name!r:.80}; there are: {there}")
        try:
            checked = tool.checked(arguments)
        except BadArguments as error:
            return refusal(CallOutcome.BAD_ARGUMENTS, str(error))
        return self._answer(await self._reply(tool, checked), tool)

    def keeps_state(self, name: str) -> bool:
        """Whether the tool of that name keeps its state; not where there is none."""
        return name in self._plans

    def forget(self, name: str) -> None:
        """Ends the process that keeps the tool's state, where there still is one."""
        if (process := self._own.pop(name, None)) is not None:
            process.close()

    def close(self) -> None:
        """Ends the episode's own processes."""
        while self._own:
            self._own.popitem()[1].close()

    async def _reply(self, tool: Tool, arguments: dict[str, Any]) -> Reply:
        if not tool.keeps_state:
            return await self._workers.call(tool.name, arguments)
        async with self._turn:
            process = self._own.get(tool.name)
            if process is None or not process.alive:
                process = self._own[tool.name] = await started(self._plans[tool.name])
            return await process.call(tool.name, arguments)

    def _answer(self, reply: Reply, tool: Tool) -> Answer:
        if reply.outcome is not CallOutcome.RESULT:
            lost = tool.keeps_state and tool.name not in self._alive()
            told = "; its variables are lost" if lost else ""
            return replace(refusal(reply.outcome, f"{tool.name}: {reply.why}{told}"), lost=lost)
        if reply.value is None:
            return refusal(CallOutcome.BAD_RESULT, f"{tool.name}: it returned None, which is no text")
        value = reply.value
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        longest = self._limits.output_characters
        if reply.cut or len(text) > longest:
            text = f"{text[:longest]}… (cut to {longest} characters)"
        return Answer(CallOutcome.RESULT, text)

    def _alive(self) -> set[str]:
        return {name for name, process in self._own.items() if process.alive}


def refusal(outcome: CallOutcome, why: str) -> Answer:
    """What the policy is told where there is no result."""
    return Answer(outcome, f"error: {why}")
