"""Plays episodes of the package `verifiers` 0.4, in an interpreter that has it.

Its training client renders messages to token ids and asks for turns at the episode's own address; its
harnesses, tasksets and rewards run as they are.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.configs.agent import agent_config_fields


class Player:
    """One of verifiers' environments."""

    def __init__(
        self,
        env: dict[str, Any],
        model_path: str,
        renderer: str,
        renderer_options: dict[str, Any],
        max_turns: int,
    ) -> None:
        """
        Args:
            env: verifiers' own `[env]` block.
            model_path: the policy's folder, with its tokenizer.
            renderer: name of its family; `auto`: by the folder's name.
            renderer_options: of that.
            max_turns: of an agent that has no limit of its own.
        """
        resolved = vf.resolve_env_config(env)
        limits = {
            name: config.model_copy(update={"max_turns": max_turns})
            for name, config in agent_config_fields(resolved).items()
            if config.max_turns is None
        }
        self._env = vf.load_environment(resolved.model_copy(update=limits))
        self._model_path = model_path
        self._renderer = None if renderer == "auto" else {"name": renderer, **renderer_options}
        self._client(base_url="http://127.0.0.1")  # refuses such a renderer
        self._stack = AsyncExitStack()
        self._starting = asyncio.Lock()
        self._serving = False

    def tasks(self, count: int) -> Iterator[dict[str, Any]]:
        """The taskset's first tasks, as rows of a data file."""
        for task in itertools.islice(self._env.taskset, count):
            data = task.data
            question = data.prompt_text or data.description or data.name or f"task {data.idx}"
            name = data.id or data.name or str(data.idx)
            row = {"id": name, "question": question, "answer": ""}
            yield {**row, "task": data.model_dump(mode="json", exclude_none=True)}

    async def play(self, episode: Any) -> dict[str, Any]:
        """Runs one of verifiers' episodes; see `worker.Episode`."""
        async with self._starting:
            if not self._serving:
                await self._stack.enter_async_context(self._env.serving())
                self._serving = True
        context = vf.ModelContext(model=episode.model, client=self._client(episode.base_url))
        done = await self._env.run_episode(self._task(episode), context)
        trained = [trace for trace in done.traces if trace.agent.trainable]
        if not done.ok or not trained:
            raise RuntimeError(_why(done))
        rewards = {trace.reward for trace in trained}
        if len(rewards) > 1:
            told = ", ".join(f"{trace.agent.name} {trace.reward:g}" for trace in trained)
            raise RuntimeError(
                f"the episode's agents earned different rewards ({told}), and an episode has one; set "
                "trainable to False for all but one of them"
            )
        return {
            "reward": rewards.pop(),
            "answer": trained[-1].last_reply,
            "facts": _facts(trained),
            "sessions": [trace.id for trace in trained],
        }

    async def aclose(self) -> None:
        """Ends what verifiers serves beside its episodes."""
        await self._stack.aclose()

    def _client(self, base_url: str) -> vf.TrainClientConfig:
        return vf.TrainClientConfig(
            base_url=base_url, renderer=self._renderer, renderer_model_name=self._model_path
        )

    def _task(self, episode: Any) -> vf.Task:
        """The task of a row that `tasks` wrote."""
        data = episode.problem["columns"].get("task")
        if not isinstance(data, dict):
            raise RuntimeError(
                f"problem {episode.problem['id']} has no column `task`; have the data file written by "
                "`megatron-rapo tasks`"
            )
        kind = type(self._env.taskset).task_type()
        return kind(kind.data_type().model_validate(data), self._env.taskset.config.task)


def _facts(traces: list[vf.Trace]) -> dict[str, float]:
    """Rewards and metrics by name; of several traces the means."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for trace in traces:
        for name, reward in trace.rewards.items():
            found[name].append(reward.score)
        for name, metric in trace.metrics.items():
            found[name].append(metric)
    return {name: statistics.fmean(values) for name, values in found.items()}


def _why(done: vf.Episode) -> str:
    """What went wrong with an episode that verifiers did not complete."""
    errors = [*done.errors, *(error for trace in done.traces for error in trace.errors)]
    told = [error.traceback or f"{error.type}: {error.message}" for error in errors]
    return "verifiers did not complete the episode:\n" + ("\n".join(told) or "no agent is trained")


def _write_tasks() -> None:
    """Writes a taskset's tasks to a file, as standard input says."""
    told = json.load(sys.stdin)
    player = Player(**told["arguments"])
    with Path(told["output"]).open("w", encoding="utf-8") as file:
        for row in player.tasks(told["count"]):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    _write_tasks()
