"""Functions as tools: what the policy is told of them, and whether what it asks for fits them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from megatron_rapo.errors import RapoError
from megatron_rapo.user_code import load, message_of, place_of

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
        return found.model_dump(exclude_unset=True, by_alias=True)

    @cached_property
    def _parameters(self) -> type[BaseModel]:
        hints, fields = get_type_hints(self.function), dict[str, Any]()
        for number, (name, parameter) in enumerate(inspect.signature(self.function).parameters.items()):
            default = ... if parameter.default is parameter.empty else parameter.default
            # Under names of ours: pydantic's own (`copy`, `model_config`, `_x`) are no fields of a model.
            fields[f"argument_{number}"] = (hints[name], Field(default, alias=name))
        return create_model(self.name, __config__=ConfigDict(extra="forbid"), **fields)

    def check(self) -> None:
        """Refuses hints that arguments cannot be held to.

        Raises:
            Exception: pydantic's, or of the hints' own code.
        """
        _ = self._parameters


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
    place = f'environment.tools: "{named}" ({place_of(function)})'
    if not function.__name__.isidentifier():
        raise RapoError(f"{place} has no name that a call could use; write it as `def`")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise RapoError(f"{place} is a generator; let it return a text, or what JSON can write")
    try:
        tool = Tool(function.__name__, address, function, _schema(function, place))
        tool.check()
    except RapoError:
        raise
    except Exception as error:  # of transformers, of pydantic, or of a hint that names nothing
        raise RapoError(
            f"{place} cannot be described: {message_of(error)}; give it a docstring with a line for each "
            "parameter under `Args:`, and each parameter a type hint"
        ) from error
    return tool


def _schema(function: Callable[..., Any], place: str) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import get_json_schema

    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise RapoError(
                f"{place} takes {parameter}, which a call cannot give by name; give each parameter a name"
            )
    hints = get_type_hints(function)
    for name in inspect.signature(function).parameters.keys() & hints.keys():
        if (odd := _undescribed(hints[name])) is not None:
            raise RapoError(
                f"{place} has the parameter {name} of type {getattr(odd, '__name__', odd)}, of which the "
                "policy would be told that it is an object, and no more; use str, int, float, bool, "
                "list[…], dict[…], Literal[…] and unions of these"
            )
    return get_json_schema(function)


def _undescribed(hint: Any) -> Any:
    """What of a type hint the schema does not describe; None where it describes all."""
    if hint in (str, int, float, bool, dict, type(None), Any) or get_origin(hint) is Literal:
        return None
    if get_origin(hint) in (list, dict, tuple, Union, UnionType):
        inner = (_undescribed(one) for one in get_args(hint) if one is not Ellipsis)
        return next((odd for odd in inner if odd is not None), None)
    return hint
