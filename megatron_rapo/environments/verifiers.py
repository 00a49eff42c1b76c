"""Environments of the package `verifiers`, which play their episodes in an interpreter that has it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from megatron_rapo.agents.plan import FOREIGN, Plan
from megatron_rapo.agents.process import STARTUP_LIMIT_S
from megatron_rapo.config import RunConfig
from megatron_rapo.environments.opening import checked_options
from megatron_rapo.environments.program import InterpreterOptions, Program, check_interpreter
from megatron_rapo.errors import RapoError
from megatron_rapo.section import PathOption


class Verifiers(Program):
    """`environment.use = "verifiers"`. A problem's column `task` holds a task of the taskset."""

    class Options(InterpreterOptions):
        """Of `environment.options`."""

        env: dict[str, Any] = Field(
            description="The package's own `[env]`: `taskset`, and for each agent harness and runtime."
        )
        python: PathOption = Field(
            Path(".venv-verifiers/bin/python"), description="The interpreter that has `verifiers`."
        )
        renderer: str = Field("auto", description="The model's family, as `renderers` calls it; or `auto`.")
        renderer_options: dict[str, Any] = Field({}, description="Options of it.")

    @classmethod
    def configured(cls, config: RunConfig, options: Any) -> Self:
        """The environment of a run.

        Raises:
            RapoError: there is no such interpreter, or it has no verifiers, or verifiers refuses `env`.
        """
        return cls.of(plan_of(config, options), options, config)


def plan_of(config: RunConfig, options: Verifiers.Options) -> Plan:
    """The program that plays verifiers' episodes."""
    arguments = {
        "env": options.env,
        "model_path": str(config.model.path.absolute()),
        "renderer": options.renderer,
        "renderer_options": options.renderer_options,
        "max_turns": config.environment.max_turns,
    }
    address = "verifiers_player:Player"
    code = (*config.run.code, FOREIGN)
    return Plan(address, options.python, code, json.dumps(arguments), option="environment.options.env")


def write_tasks(config: RunConfig, count: int, output: Path) -> int:
    """Writes the taskset's first tasks as a JSONL file; how many there were.

    Raises:
        RapoError: the run has no environment of verifiers, or verifiers cannot load it or its tasks.
    """
    if config.environment.use != "verifiers":
        raise RapoError(
            f'environment.use = "{config.environment.use}" has no tasks of its own; set it to "verifiers"'
        )
    options = checked_options(Verifiers.Options, "verifiers", config.environment.options)
    plan = plan_of(config, options)
    check_interpreter(plan.python)
    told = {"arguments": json.loads(plan.arguments), "count": count, "output": str(output.absolute())}
    script = FOREIGN / "verifiers_player.py"
    try:
        done = subprocess.run(
            [plan.python, script],
            input=json.dumps(told),
            env=plan.environment,
            text=True,
            capture_output=True,
            timeout=STARTUP_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise RapoError(
            f"the tasks of environment.options.env were not written within {STARTUP_LIMIT_S:g} s; take fewer"
        ) from error
    if done.returncode:
        raise RapoError(
            f"environment.options.env: {plan.python} cannot write its tasks; mend it, or install what it "
            f"needs:\n{done.stderr[-4000:]}"
        )
    with output.open(encoding="utf-8") as rows:
        return sum(1 for _ in rows)
