"""What pydantic found wrong, in words that name the key, the value and the remedy."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_rapo.config.algorithm import DEFAULT_METHOD, find_method
from megatron_rapo.config.data import TrainingData
from megatron_rapo.config.options import option_names, sections_of
from megatron_rapo.config.schema import RunConfig
from megatron_rapo.config.source import LABEL_MEANS
from megatron_rapo.config.write import toml_value
from megatron_rapo.engines.kinds import DEFAULT_KIND, KINDS, find_kind
from megatron_rapo.methods.named import METHODS
from megatron_rapo.section import Section

# The tables of each kind of prompt source, by the name of the kind.
_SOURCES = {table.model_fields["source"].annotation.__args__[0]: table for table in sections_of(TrainingData)}  # type: ignore[union-attr]

# Where options of earlier versions are now.
_MOVED = {
    "rollout.urls": "rollout.engine.urls, beside rollout.engine.kind,",
    "rollout.router": "rollout.engine.router",
    "rollout.sglang": '[rollout.engine], with kind = "sglang",',
    "rollout.embedded_servers": "rollout.engine.servers",
    "rollout.embedded_device": "rollout.engine.device",
    "rollout.embedded_threads": "rollout.engine.threads",
    "observe.mismatch_alarm": "guards.mismatch_limit",
    "observe.mismatch_action": "guards.mismatch",
    "observe.idle_steps": "guards.steps_in_a_row",
}

# Options that other trainers have, and why this one does not.
_ABSENT = dict.fromkeys(
    ("rollout.top_p", "rollout.top_k", "rollout.min_p"),
    "; rollouts sample with full support: engines do not tell which tokens such a cut leaves, and log-probs "
    "could not be compared with the trainer's (docs/engines.md); remove it",
)


def explain(error: ValidationError, source: str, values: Mapping[str, Any]) -> str:
    """One line a problem.

    Args:
        error: what was found wrong with `values`.
        source: where they came from.
        values: what was to be a configuration.
    """
    problems = [_explain_one(problem, values) for problem in error.errors()]
    return "\n  ".join([f"configuration {source} is not valid:", *problems])


def _explain_one(problem: ErrorDetails, values: Mapping[str, Any]) -> str:
    key, given = _key(problem["loc"], values), problem["input"]
    value = json.dumps(given, default=str)
    context: dict[str, Any] = problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return f"{key} = {value} is not an option{_instead(key, problem['loc'], values)}"
        case "method":
            return f"{key}.method = {json.dumps(context['name'])} {context['why']}"
        case "engine_kind":
            named = f" = {json.dumps(context['name'])}" if "name" in context else ""
            return f"{key}.kind{named} {context['why']}"
        case "missing" if "." not in key:
            return f"section [{key}] is missing; add it (docs/configuration.md)"
        case "union_tag_not_found":
            return (
                f"{key}.source is missing; set it to {', '.join(list(_SOURCES)[:-1])} or {list(_SOURCES)[-1]}"
            )
        case "union_tag_invalid":
            return f'{key}.source = "{context["tag"]}" is not one of {context["expected_tags"]}'
        case "string_pattern_mismatch":  # names are the only text of a given form
            return f"{key} = {value}: must be of {LABEL_MEANS}"
        case _:
            return explain_value(problem, key)


def explain_value(problem: ErrorDetails, key: str) -> str:
    """What is wrong with a value of any section: one line, which begins with the option's full name."""
    given = problem["input"]
    value = json.dumps(given, default=str)
    match problem["type"]:
        case "value_error":  # A section's own check: its message begins with the option's name.
            error = problem["ctx"]["error"]
            return f"{key}.{error}" if key else str(error)
        case "missing":
            return f"{key} is missing; set it"
        case "list_type":
            return f"{key} = {value}: must be a list; write {_written(key, [given])}"
        case "string_type" | "path_type":
            return f"{key} = {value}: must be text; write {_written(key, str(given))}"
        case "bool_type":
            return f"{key} = {value}: must be true or false"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key} = {value}: must be a table; write [{key}], and its options below it"
        case _:
            return f"{key} = {value}: {re.sub(r'^[A-Z][a-z]+ should', 'must', problem['msg'])}"


def _written(key: str, value: Any) -> str:
    """An option in a file, and on the command line, where a shell takes quotes away."""
    text = toml_value(value)
    return f"{key.rpartition('.')[2]} = {text}, or --set '{key}={text}'"


def _key(location: tuple[int | str, ...], values: Mapping[str, Any]) -> str:
    """The option's full name, as it was written.

    Behind a union's field pydantic names the member, which is no key; and a single table of `evaluate.data`
    has no number.
    """
    evaluate = values.get("evaluate")
    single = isinstance(evaluate, dict) and isinstance(evaluate.get("data"), dict)
    key = ""
    for depth, part in enumerate(location):
        of_evaluation = location[:2] == ("evaluate", "data")
        if (
            location[:depth] == ("data",)
            or (depth == 4 and location[:3] == ("data", "mixture", "sources"))
            or (depth == 3 and of_evaluation)
            or (depth == 2 and single and of_evaluation)
        ):
            continue
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    return key.removeprefix(".")


def _instead(key: str, location: tuple[int | str, ...], values: Mapping[str, Any]) -> str:
    """What may have been meant in place of an unknown key."""
    if key in _MOVED:
        page = "guards" if key.startswith("observe.") else "engines"
        return f"; it is {_MOVED[key]} now (docs/{page}.md)"
    if key in _ABSENT:
        return _ABSENT[key]
    table, _, option = key.rpartition(".")
    if table == "rollout.engine":
        kind = _chosen(values["rollout"]["engine"], "kind", DEFAULT_KIND)
        have = [name for name, one in KINDS.items() if option in one.Options.model_fields]
        if have:
            return f' of kind = "{kind}"; kind = "{have[0]}" has it: change the kind, or remove it'
        return f' of kind = "{kind}", which has {", ".join(find_kind(kind).Options.model_fields)}'
    if table == "algorithm":
        method = _chosen(values["algorithm"], "method", DEFAULT_METHOD)
        own = find_method(method, _code_folders(values.get("run"))).Options
        return _of_methods(option, method, own)
    sources = [name for name, section in _SOURCES.items() if option in section.model_fields]
    if sources and location[-2] in _SOURCES:
        has = " or ".join(f'source = "{name}"' for name in sources)
        return f' of source = "{location[-2]}": {table} has it with {has}; change the source, or remove it'
    names = sorted(_options_beside(location))
    elsewhere = [name for name in names if name.rpartition(".")[2] == option]
    near = elsewhere or difflib.get_close_matches(key, names, n=1, cutoff=0.8)
    return f"; {f'did you mean {near[0]}? ' if near else ''}docs/configuration.md lists them"


def _code_folders(run: Any) -> list[Path]:
    folders = run.get("code") if isinstance(run, dict) else None
    return [Path(one) for one in folders if isinstance(one, str)] if isinstance(folders, list) else []


def _chosen(table: Mapping[str, Any], option: str, default: str) -> str:
    """What a table's options hang on; that it is no name at all is a problem of its own."""
    found = table.get(option, default)
    return found if isinstance(found, str) else default


def _listed(methods: Sequence[str]) -> str:
    *some, last = methods
    return f"{', '.join(some)} and {last} have" if some else f"{last} has"


def _of_methods(option: str, method: str, section: type[Section]) -> str:
    """Which methods have the option."""
    if option == "preset":  # as earlier versions called it
        return "; methods are chosen by algorithm.method, and each has options of its own"
    have = [name for name, one in METHODS.items() if option in one.Options.model_fields]
    if have:
        return (
            f' of method = "{method}"; {_listed(have)} it: change '
            "the method, or remove it (in an overlay, by the value @default)"
        )
    near = difflib.get_close_matches(option, section.model_fields, n=1)
    meant = f"did you mean algorithm.{near[0]}? " if near else ""
    return f' of method = "{method}"; {meant}docs/configuration.md lists them'


def _options_beside(location: tuple[int | str, ...]) -> set[str]:
    """All options, without those that the chosen prompt source lacks."""
    names = set(option_names(RunConfig))
    if location[0] == "data" and location[1] in _SOURCES:
        own = {f"data.{option}" for option in _SOURCES[location[1]].model_fields}
        names = {name for name in names if not name.startswith("data.")} | own
    return names
