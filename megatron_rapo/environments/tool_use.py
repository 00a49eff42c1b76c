"""The policy calls functions, sees what they return, and answers once it calls no more."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import asdict
from typing import Any, Self

from pydantic import Field

from megatron_rapo.config import RunConfig
from megatron_rapo.environments.confining import check_processes
from megatron_rapo.environments.dialogue import Dialogue, Ending
from megatron_rapo.environments.process_options import ProcessOptions
from megatron_rapo.environments.rendering import Message, Rendering, RenderingOptions, open_rendering
from megatron_rapo.episode.environment import Generate
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.problem import Problem
from megatron_rapo.section import PositiveInt
from megatron_rapo.tools.described import load_tools
from megatron_rapo.tools.outcome import CallOutcome
from megatron_rapo.tools.toolbox import Answer, EpisodeTools, Toolbox, refusal


class ToolUse:
    """`environment.use = "tool_use"`. The configured reward judges the last turn, which calls nothing."""

    class Options(ProcessOptions, RenderingOptions):
        """Of `environment.options`."""

        calls_per_turn: PositiveInt = Field(
            8, description="Calls of a turn that are answered; more are refused."
        )
        parallel: bool = Field(False, description="Whether the calls of a turn run at the same time.")

    def __init__(self, toolbox: Toolbox, rendering: Rendering, options: Options, max_turns: int) -> None:
        self._toolbox = toolbox
        self._rendering = rendering
        self._options = options
        self._max_turns = max_turns

    @classmethod
    def configured(cls, config: RunConfig, options: Options) -> Self:
        """The environment of a run.

        Raises:
            RapoError: a tool does not exist, cannot be described, or cannot be confined on this machine; or
                the family's template cannot be continued exactly.
        """
        from megatron_rapo.data.tokenizer import load_tokenizer

        tools = load_tools(config.environment.tools, config.run.code)
        schemas = [tool.schema for tool in tools]
        rendering = open_rendering(config, options, load_tokenizer(config.model.path), schemas)
        rendering.check_continues(
            {"role": "tool", "content": "4", "name": tools[0].name, "tool_call_id": "0"}
        )
        toolbox = Toolbox(tools, options.limits, code=config.run.code, workers=options.workers)
        check_processes(toolbox.plans)
        return cls(toolbox, rendering, options, config.environment.max_turns)

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        """See `Environment`."""
        del seed  # it draws nothing of its own
        dialogue = Dialogue(problem, generate, self._rendering, self._max_turns)
        counts: Counter[str] = Counter({f"calls_{outcome}": 0 for outcome in CallOutcome})
        seconds, ending = 0.0, None
        async with self._toolbox.episode() as tools:
            while ending is None:
                said = await dialogue.hear()
                calls = said.parsed.tool_calls
                if said.turn.truncated:
                    ending = Ending.OUT_OF_TOKENS
                elif not calls:
                    ending = Ending.ANSWERED
                else:
                    began = time.monotonic()
                    answers = await self._answers(generate, tools, calls)
                    seconds += time.monotonic() - began
                    counts.update(f"calls_{answer.outcome}" for answer in answers)
                    ending = dialogue.say(list(map(_message, range(len(calls)), calls, answers)))
        return dialogue.episode(ending, {"calls": counts.total(), **counts, "tool_s": seconds})

    async def aclose(self) -> None:
        """Ends the processes of tools."""
        await self._toolbox.aclose()

    async def _answers(self, generate: Generate, tools: EpisodeTools, calls: list[Any]) -> list[Answer]:
        most = self._options.calls_per_turn
        answered = [_answer(generate, tools, call) for call in calls[:most]]
        if self._options.parallel:
            found = await asyncio.gather(*answered)
        else:
            found = [await one for one in answered]
        refused = refusal(
            CallOutcome.TOO_MANY_CALLS, f"more than {most} calls in a turn; this one was not made"
        )
        return [*found, *[refused] * len(calls[most:])]


async def _answer(generate: Generate, tools: EpisodeTools, call: Any) -> Answer:
    """Of one call, as the family's parser read it."""
    if call.status != "unknown_tool" and (call.status != "ok" or call.name is None):
        return refusal(
            CallOutcome.MALFORMED, f"this is no call that can be read ({call.status}): {call.raw[:200]}"
        )
    name, arguments = str(call.name), call.arguments or {}

    async def ask() -> dict[str, Any]:
        return asdict(await tools.call(name, arguments))

    # What keeps its state is called again, so that later calls find it.
    heard = await generate.recorded([name, arguments], ask, again=tools.keeps_state(name))
    answer = Answer(CallOutcome(heard["outcome"]), heard["text"], heard["lost"])
    if answer.lost:
        tools.forget(name)
    return answer


def _message(number: int, call: Any, answer: Answer) -> Message:
    return {
        "role": "tool",
        "content": answer.text,
        "name": str(call.name or "unknown"),
        "tool_call_id": str(call.id or number),
    }
