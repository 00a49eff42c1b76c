"""The environment that the configuration names: one of ours, or a class of the user's own."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import ValidationError

from megatron_rapo.config import RunConfig
from megatron_rapo.environments.single_turn import SingleTurn
from megatron_rapo.episode.environment import Environment
from megatron_rapo.errors import RapoError
from megatron_rapo.section import Section
from megatron_rapo.user_code import ADDRESS, load

ENVIRONMENTS: dict[str, type[Any]] = {"single_turn": SingleTurn}


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
    return _made(kind, options.use, options.options)


def _kind(config: RunConfig) -> Any:
    use = config.environment.use
    if use in ENVIRONMENTS:
        return ENVIRONMENTS[use]
    if ADDRESS.fullmatch(use):
        return load(use, config.run.code, "environment.use")
    raise RapoError(
        f'environment.use = "{use}" does not exist; choose one of {", ".join(ENVIRONMENTS)}, or name a class '
        'of your own, "module:Name"'
    )


def _made(kind: type[Any], use: str, options: dict[str, Any]) -> Environment:
    """An object of the class, which gets its options as `Options`, where it has that, or by name."""
    declared = getattr(kind, "Options", None)
    try:
        if isinstance(declared, type) and issubclass(declared, Section):
            return kind(declared.model_validate(options))
        inspect.signature(kind).bind(**options)
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise RapoError(
            f"environment.options.{name}: {first['msg'].lower()}; {use} has the options "
            f"{', '.join(declared.model_fields) or 'none'}"  # type: ignore[union-attr]
        ) from error
    except TypeError as error:
        raise RapoError(
            f'environment.options does not fit environment.use = "{use}": {error}; {_place(kind)}'
        ) from error


def _place(kind: Any) -> str:
    try:
        return f"see {inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}"
    except (TypeError, OSError):
        return "name a class"
