"""The section `[algorithm]`: the options of the method that it names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationInfo
from pydantic_core import PydanticCustomError

from megatron_rapo.errors import RapoError
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.options import Options
from megatron_rapo.user_code import ours_or_own, place_of

DEFAULT_METHOD = "rapo"


def find_method(name: str, folders: Sequence[Path] = ()) -> type[Method]:
    """The method that `algorithm.method` calls so: one with a name, or a class of the user's own.

    Args:
        name: a name, or `module:class`.
        folders: of the user's own modules (`run.code`).

    Raises:
        ValueError: there is no method of that name.
        RapoError: there is no such class, or it is no method.
    """
    found = ours_or_own(name, METHODS, folders, "algorithm.method", "method")
    return METHODS[name] if name in METHODS else _of_the_user(name, found)


def _of_the_user(address: str, found: Any) -> type[Method]:
    named = f'algorithm.method = "{address}" ({place_of(found)})'
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise RapoError(f"{named} is no class that inherits from megatron_rapo.Method; let it")
    if not (isinstance(found.Options, type) and issubclass(found.Options, Options)):
        raise RapoError(f"{named} has Options that do not inherit from Method.Options; let them")
    for hook in ("advantages", "terms"):
        if getattr(found, hook) is getattr(Method, hook):
            raise RapoError(f"{named} has no {hook}, which no method can do without; write it")
    if (found.state is Method.state) != (found.restore is Method.restore):
        has, lacks = ("restore", "state") if found.state is Method.state else ("state", "restore")
        raise RapoError(f"{named} has {has}, but no {lacks}; write both, or none")
    return found


def _of_its_method(values: Any, info: ValidationInfo) -> Any:
    if not isinstance(values, dict):
        return values
    name = values.get("method", DEFAULT_METHOD)
    if not isinstance(name, str):
        return values  # which the section's own type then refuses
    run = info.data.get("run")  # missing where it is wrong itself
    try:
        method = find_method(name, run.code if run else ())
    except ValueError as error:
        raise PydanticCustomError("method", "{why}", {"why": str(error), "name": name}) from None
    return method.Options.model_validate({**values, "method": name})


Algorithm = Annotated[SerializeAsAny[Options], BeforeValidator(_of_its_method)]
"""Any method's options; `method` says whose."""
