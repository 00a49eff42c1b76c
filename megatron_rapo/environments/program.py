"""A program that is not ours plays the episodes, and asks for turns at a gateway before the engines."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from megatron_rapo.agents.plan import Plan
from megatron_rapo.agents.process import ProgramFault
from megatron_rapo.agents.processes import AgentProcesses, check_program
from megatron_rapo.config import RunConfig
from megatron_rapo.episode.environment import Generate
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.score import Score
from megatron_rapo.errors import RapoError
from megatron_rapo.gateway.route import Ending, Route
from megatron_rapo.gateway.server import Gateway
from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.section import PathOption, PositiveInt, Section
from megatron_rapo.user_code import malformed

_KNOWN = ("reward", "answer", "facts", "sessions")


class InterpreterOptions(Section):
    """Where a program runs."""

    processes: PositiveInt = Field(1, description="Processes of each head, among which episodes are shared.")


class Program:
    """`environment.use = "program"`. The program says what an episode earned, or the configured reward does.

    What passes the gateway is the record that is trained on; the program is told its address.
    """

    class Options(InterpreterOptions):
        """Of `environment.options`."""

        program: str = Field(
            description="`module:name` of a function of an episode, async or plain; or a class with `play`."
        )
        arguments: dict[str, Any] = Field({}, description="Arguments of it, by name.")
        python: PathOption | None = Field(
            None, description="The interpreter that has its packages. Default: the trainer's own."
        )

    def __init__(self, agents: AgentProcesses, gateway: Gateway, model_path: Path, max_turns: int) -> None:
        self._agents = agents
        self._gateway = gateway
        self._model_path = model_path
        self._max_turns = max_turns

    @classmethod
    def configured(cls, config: RunConfig, options: Options) -> Self:
        """The environment of a run.

        Raises:
            RapoError: there is no such interpreter or program, or it cannot be loaded.
        """
        if wrong := malformed(options.program):
            raise RapoError(f'environment.options.program = "{options.program}" {wrong}')
        python = options.python or Path(sys.executable)
        plan = Plan(options.program, python, tuple(config.run.code), json.dumps(options.arguments))
        return cls.of(plan, options, config)

    @classmethod
    def of(cls, plan: Plan, options: InterpreterOptions, config: RunConfig) -> Self:
        """The environment whose episodes this program plays.

        Raises:
            RapoError: there is no such interpreter, or it cannot load the program.
        """
        from megatron_rapo.data.tokenizer import load_tokenizer, vocabulary_size
        from megatron_rapo.model.hf_config import read_architecture

        check_interpreter(plan.python)
        plan = replace(plan, grace_s=min(plan.grace_s, config.environment.time_limit_s / 2))
        environment = RankEnvironment.read()
        if environment is None or environment.rank == 0:
            check_program(plan)
        rows = read_architecture(config.model.config or config.model.path).vocabulary
        vocabulary = vocabulary_size(load_tokenizer(config.model.path), rows)
        most = config.environment.max_turns
        path = config.model.path.absolute()
        return cls(AgentProcesses(plan, options.processes), Gateway(path.name, vocabulary, most), path, most)

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        """See `Environment`."""
        await self._gateway.start()
        async with self._gateway.episode(generate) as route:
            playing = asyncio.create_task(self._agents.play(self._told(problem, route, seed)))
            try:
                await asyncio.wait({playing, route.failed}, return_when=asyncio.FIRST_COMPLETED)
                if route.failed.done():
                    route.failed.result()
                said = playing.result()
            finally:
                playing.cancel()
                await asyncio.gather(playing, return_exceptions=True)
        return episode_of(said, route)

    async def aclose(self) -> None:
        """Ends the program's processes and the gateway."""
        await self._agents.aclose()
        await self._gateway.aclose()

    def _told(self, problem: Problem, route: Route, seed: int) -> dict[str, Any]:
        url = self._gateway.url_of(route)
        return {
            "url": url,
            "base_url": f"{url}/v1",
            "model": self._gateway.model,
            "model_path": str(self._model_path),
            "problem": {**vars(problem), "columns": dict(problem.columns)},
            "seed": seed,
            "max_turns": self._max_turns,
            "max_tokens": route.max_tokens,
        }


def check_interpreter(python: Path) -> None:
    """Refuses what cannot be started.

    Raises:
        RapoError: it is no program that this user may run.
    """
    if not python.is_file() or not os.access(python, os.X_OK):
        raise RapoError(
            f"environment.options.python = {str(python)!r} is no interpreter; name one that has the "
            "program's packages, such as .venv/bin/python"
        )


def episode_of(said: Any, route: Route) -> Episode:
    """What is trained on, of a program's answer and what passed.

    Raises:
        ProgramFault: it is no answer.
    """
    told = _as_table(said)
    last = route.record.last
    sessions = told.get("sessions")
    sequences = route.record.sequences(sessions)
    if last is None or not sequences:
        raise ProgramFault(
            f"the program asked for {route.turns} turns, none of which is trained on (sessions of the "
            f"episode: {route.record.sessions}, of the answer: {sessions})"
        )
    answer = told.get("answer")
    text = last.text if answer is None else str(answer)
    scored = "reward" in told
    return Episode(
        sequences,
        answer=text,
        score=Score(told["reward"], told.get("facts", {}), text) if scored else None,
        truncated=route.ending is not Ending.ANSWERED or last.truncated,
        facts={
            "turns": route.turns,
            "refused": route.refused,
            "sequences": len(sequences),
            **{f"ended_{one}": float(one is route.ending) for one in Ending},
            **({} if scored else told.get("facts", {})),
        },
    )


def _as_table(said: Any) -> Mapping[str, Any]:
    if isinstance(said, str):
        return {"answer": said}
    if isinstance(said, int | float):
        return {"reward": said}
    if isinstance(said, dict) and not set(said) - set(_KNOWN) and {"reward", "answer"} & set(said):
        return said
    raise ProgramFault(
        f"the program returned {said!r:.200}; return a reward, a text that the configured reward judges, "
        f"or a dict of {', '.join(_KNOWN)} with one of the first two"
    )
