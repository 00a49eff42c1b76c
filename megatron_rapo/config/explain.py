"""What pydantic found wrong, in words that name the key, the value and the remedy."""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_rapo.config.options import option_names
from megatron_rapo.config.schema import RunConfig


def explain(error: ValidationError, source: str) -> str:
    """One line a problem; `source` names where the values came from."""
    problems = [_explain_one(problem) for problem in error.errors()]
    return "\n  ".join([f"configuration {source} is not valid:", *problems])


def _explain_one(problem: ErrorDetails) -> str:
    key, value = _key(problem["loc"]), json.dumps(problem["input"], default=str)
    context: dict[str, Any] = problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return f"{key} = {value} is not an option; {_nearest(key)}docs/configuration.md lists them"
        case "missing" if "." not in key:
            return f"section [{key}] is missing; add it (docs/configuration.md)"
        case "missing":
            return f"{key} is missing; set it"
        case "union_tag_not_found":
            return f"{key}.source is missing; set it to file, countdown or arithmetic"
        case "union_tag_invalid":
            return f'{key}.source = "{context["tag"]}" is not one of {context["expected_tags"]}'
        case "value_error":  # A section's own check: its message begins with the option's name.
            return f"{key}.{context['error']}" if key else str(context["error"])
        case _:
            return f"{key} = {value}: {problem['msg'].replace('Input should', 'must')}"


def _key(location: tuple[int | str, ...]) -> str:
    """The option's full name. Behind a union's field pydantic names the member, which is no key."""
    key = ""
    for depth, part in enumerate(location):
        if location[:depth] == ("data",) or (depth == 3 and location[:2] == ("evaluate", "data")):
            continue
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix(".")


def _nearest(key: str) -> str:
    near = difflib.get_close_matches(key, sorted(set(option_names(RunConfig))), n=1, cutoff=0.8)
    return f"did you mean {near[0]}? " if near else ""
