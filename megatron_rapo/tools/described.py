"""Functions as tools: what the policy is told of them, and whether what it asks for fits them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from megatron_rapo.errors import RapoError
from megatron_rapo.user_code import load, place_of

SHIPPED = {
    "python": "megatron_rapo.tools.python_tool:python",
    "calculator": "megatron_rapo.tools.calculator:calculator",
}
"""Tools that are named without a module."""

KEEPS_STATE, RUNS_CODE = "keeps_state", "runs_code"
"""Attributes of a function: whether it gets a process of its own for each episode, and whether it runs what
the policy writes, so that no limit is ever lifted for it."""


class BadArguments(Exception):
    """What is wrong with the arguments of a call, in words for the policy."""


@dataclass(frozen=True)
class Tool:
    """A function that the policy may call.

    Attributes:
        name: that calls use.
        address: `module:name` of the function.
        function: as it was imported here, to be looked at; it is called in another process.
        schema: the JSON schema that chat templates take.
    """

    name: str
    address: str
    function: Callable[..., Any]
    schema: Mapping[str, Any]

    @property
    def keeps_state(self) -> bool:
        """Whether it has a process of its own for each episode."""
        return getattr(self.function, KEEPS_STATE, False) is True

    @property
    def runs_code(self) -> bool:
        """Whether it runs what the policy writes."""
        return getattr(self.function, RUNS_CODE, False) is True

    def checked(self, arguments: object) -> dict[str, Any]:
        """The arguments as the function's hints want them, ready for JSON.

        Raises:
            BadArguments: they do not fit.
        """
        if not isinstance(arguments, Mapping):
            raise BadArguments("the arguments must be an object with a value for each name")
        try:
            found = self._parameters.model_validate(dict(arguments))
        except ValidationError as error:
            first = error.errors()[0]
            raise BadArguments(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error
        return found.model_dump(exclude_unset=True)

    @cached_property
    def _parameters(self) -> type[BaseModel]:
        hints = get_type_hints(self.function)
        fields: dict[str, Any] = {
            name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
            for name, parameter in inspect.signature(self.function).parameters.items()
        }
        return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)


def load_tools(addresses: Sequence[str], code: Sequence[Path]) -> tuple[Tool, ...]:
    """The tools that `environment.tools` names.

    Raises:
        RapoError: one does not exist, cannot be described, or has the name of another.
    """
    tools = tuple(_tool(address, code) for address in addresses)
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise RapoError(f"environment.tools has two functions {name}; give each a name of its own")
    return tools


def _tool(named: str, code: Sequence[Path]) -> Tool:
    address = SHIPPED.get(named, named)
    if ":" not in address:
        raise RapoError(
            f'environment.tools: "{named}" does not exist; choose one of {", ".join(SHIPPED)}, or name a '
            'function of your own, "module:name"'
        )
    function = load(address, code, "environment.tools")
    if not inspect.isroutine(function):
        raise RapoError(f'environment.tools: "{named}" ({place_of(function)}) is no function; name one')
    return Tool(function.__name__, address, function, _schema(function, named))


def _schema(function: Callable[..., Any], named: str) -> dict[str, Any]:
    from transformers.utils import chat_template_utils as templates

    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise RapoError(
                f'environment.tools: "{named}" ({place_of(function)}) takes {parameter}, which a call cannot '
                "give by name; give each parameter a name"
            )
    try:
        return templates.get_json_schema(function)
    except (templates.TypeHintParsingException, templates.DocstringParsingException) as error:
        raise RapoError(
            f'environment.tools: "{named}" ({place_of(function)}) cannot be described: {error}; '
            "give it a docstring with a line for each parameter under `Args:`, and each parameter a type hint"
        ) from error
