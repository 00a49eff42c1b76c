"""The environment that the configuration names: one of ours, or a class of the user's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_rapo.config import RunConfig
from megatron_rapo.config.explain import explain_value
from megatron_rapo.episode.environment import Environment
from megatron_rapo.errors import RapoError
from megatron_rapo.section import Section
from megatron_rapo.user_code import in_order, ours_or_own

S = TypeVar("S", bound=Section)

_ARGUMENTS = ("problem", "generate", "seed")

ENVIRONMENTS: dict[str, str] = {
    "single_turn": "megatron_rapo.environments.single_turn:SingleTurn",
    "tool_use": "megatron_rapo.environments.tool_use:ToolUse",
    "conversation": "megatron_rapo.environments.conversation:Conversation",
    "countdown_turns": "megatron_rapo.environments.countdown_turns:CountdownTurns",
    "program": "megatron_rapo.environments.program:Program",
    "verifiers": "megatron_rapo.environments.verifiers:Verifiers",
}
"""Ours by name; imported where they are used, as some need libraries that the others do not."""


def needs_tokenizer(config: RunConfig) -> bool:
    """Whether to open the environment takes the model's tokenizer: ours of several turns do."""
    return config.environment.use in ENVIRONMENTS and config.environment.use != "single_turn"


def open_environment(config: RunConfig) -> Environment:
    """The environment of all episodes of this process.

    Raises:
        RapoError: there is none of this name, it is no environment, or it refuses its options.
    """
    options = config.environment
    kind = _kind(config)
    run = getattr(kind, "run", None)
    if not inspect.isclass(kind) or not inspect.iscoroutinefunction(run):
        raise RapoError(
            f'environment.use = "{options.use}" is no class with `async def run(self, problem, generate, '
            f"seed)`; {_place(kind)}"
        )
    made = _made(kind, config)
    in_order(made.run, _ARGUMENTS, f"{options.use}.run", "environment.use", elsewhere=False)
    return made


def _kind(config: RunConfig) -> Any:
    use = config.environment.use
    try:
        found = ours_or_own(use, ENVIRONMENTS, config.run.code, "environment.use", "environment")
    except ValueError as error:
        raise RapoError(f'environment.use = "{use}" {error}') from None
    return _ours(use) if use in ENVIRONMENTS else found


def _ours(use: str) -> Any:
    module, _, name = ENVIRONMENTS[use].partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != "renderers":
            raise
        raise RapoError(
            f'environment.use = "{use}" needs the package renderers; pip install "megatron_rapo[tools]"'
        ) from error


def _made(kind: type[Any], config: RunConfig) -> Environment:
    """An object of the class, which gets its options as `Options`, where it has that, or by name."""
    use, options = config.environment.use, config.environment.options
    declared = getattr(kind, "Options", None)
    try:
        if isinstance(declared, type) and issubclass(declared, Section):
            checked = checked_options(declared, use, options)
            return kind(checked) if use not in ENVIRONMENTS else kind.configured(config, checked)
        inspect.signature(kind).bind(**options)
        return kind(**options)
    except TypeError as error:
        raise RapoError(
            f'environment.options does not fit environment.use = "{use}": {error}; {_place(kind)}'
        ) from error


def checked_options(declared: type[S], use: str, options: Mapping[str, Any]) -> S:
    """The options of an environment, typed.

    Raises:
        RapoError: one is none of them, or has a value that it cannot have.
    """
    try:
        return declared.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("environment.options", *first["loc"])))
        has = f"{use} has the options {', '.join(declared.model_fields) or 'none'}"
        told = f"{key} is not an option" if first["type"] == "extra_forbidden" else explain_value(first, key)
        raise RapoError(f"{told}; {has}") from error


def _place(kind: Any) -> str:
    try:
        return f"see {inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}"
    except (TypeError, OSError):
        return "name a class"
