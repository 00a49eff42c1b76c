"""The section `[algorithm]`: the options of the method that it names."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny
from pydantic_core import PydanticCustomError

from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.options import Options

DEFAULT_METHOD = "rapo"


def find_method(name: str) -> type[Method]:
    """The method that `algorithm.method` calls so.

    Raises:
        ValueError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"is no method; {meant}choose one of {', '.join(METHODS)}")


def _of_its_method(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    name = values.get("method", DEFAULT_METHOD)
    if not isinstance(name, str):
        return values  # which the section's own type then refuses
    try:
        method = find_method(name)
    except ValueError as error:
        raise PydanticCustomError("method", "{why}", {"why": str(error), "name": name}) from None
    return method.Options.model_validate({**values, "method": name})


Algorithm = Annotated[SerializeAsAny[Options], BeforeValidator(_of_its_method)]
"""Any method's options; `method` says whose."""
