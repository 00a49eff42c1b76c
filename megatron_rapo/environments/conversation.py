"""A function of the user's own speaks with the policy: a simulated user, or a checker."""

from __future__ import annotations

from contextlib import suppress
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
from megatron_rapo.episode.score import Score
from megatron_rapo.errors import RapoError
from megatron_rapo.tools.outcome import CallOutcome, Reply
from megatron_rapo.tools.plan import Plan
from megatron_rapo.tools.workers import Workers
from megatron_rapo.user_code import in_order, load

_OPTION = "environment.options.user"
_ARGUMENTS = ("messages", "problem")  # given by name


class UserFault(Exception):
    """What the function did instead of a reply: the episode's reward is unknown."""


class Conversation:
    """`environment.use = "conversation"`.

    After each turn of the policy the function is called with all messages (`role`, `content`) and the
    problem. It returns the next message, or None to end, or a `Score` to end with a reward of its own;
    without one the configured reward judges the last turn.
    """

    class Options(ProcessOptions, RenderingOptions):
        """Of `environment.options`."""

        user: str = Field(
            description="The function (messages, problem) → text, None or Score, as `module:name`."
        )

    def __init__(self, workers: Workers, rendering: Rendering, max_turns: int) -> None:
        self._workers = workers
        self._rendering = rendering
        self._max_turns = max_turns

    @classmethod
    def configured(cls, config: RunConfig, options: Options) -> Self:
        """The environment of a run.

        Raises:
            RapoError: there is no such function, it takes other arguments or cannot be confined on this
                machine; or the family's template cannot be continued exactly.
        """
        from megatron_rapo.data.tokenizer import load_tokenizer

        function = load(options.user, config.run.code, _OPTION)
        in_order(function, (), options.user, _OPTION, options=dict.fromkeys(_ARGUMENTS))
        rendering = open_rendering(config, options, load_tokenizer(config.model.path))
        rendering.check_continues({"role": "user", "content": "Are you sure?"})
        plan = Plan({"user": options.user}, options.limits, config.run.code)
        check_processes([plan])
        return cls(Workers(plan, options.workers), rendering, config.environment.max_turns)

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        """See `Environment`."""
        del seed  # it draws nothing of its own
        dialogue = Dialogue(problem, generate, self._rendering, self._max_turns)
        messages: list[Message] = [{"role": "user", "content": problem.question}]
        ending, score = None, None
        while ending is None:
            said = await dialogue.hear()
            messages.append(said.message)
            if said.turn.truncated:
                ending = Ending.OUT_OF_TOKENS
                break
            reply = _value(await self._reply(messages, problem, generate))
            if isinstance(reply, str):
                messages.append({"role": "user", "content": reply})
                ending = dialogue.say(messages[-1:])
            else:
                ending, score = Ending.ANSWERED, reply
        return dialogue.episode(ending, {}, score)

    async def _reply(self, messages: list[Message], problem: Problem, generate: Generate) -> Reply:
        async def ask() -> dict[str, Any]:
            return asdict(await self._workers.call("user", {"messages": messages, "problem": problem}))

        heard = await generate.recorded("user", ask)
        return Reply(**{**heard, "outcome": CallOutcome(heard["outcome"])})

    async def aclose(self) -> None:
        """Ends the function's processes."""
        self._workers.close()


def _value(reply: Reply) -> str | Score | None:
    """The next message; or None or a score, at the end.

    Raises:
        UserFault: the function raised, took too long, or died.
        RapoError: it returned what is none of these.
    """
    if reply.outcome not in (CallOutcome.RESULT, CallOutcome.BAD_RESULT):
        raise UserFault(f"the function of {_OPTION}: {reply.why}")
    value: Any = reply.value
    if reply.outcome is CallOutcome.RESULT and (value is None or isinstance(value, str)):
        return f"{value}… (cut to {len(value)} characters)" if value and reply.cut else value
    if reply.outcome is CallOutcome.RESULT and isinstance(value, dict) and value.keys() == {"score"}:
        with suppress(TypeError):  # a table of the function's own
            return Score(**value["score"])
    raise RapoError(
        f"the function of {_OPTION}: {reply.why or f'it returned {value!r:.100}'}; return a text, None, or a "
        "Score"
    )
