"""Records out of a function of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_rapo.config.data import FunctionData
from megatron_rapo.data.tasks.problem import Split
from megatron_rapo.episode.facts import shown
from megatron_rapo.errors import RapoError
from megatron_rapo.user_code import load, own_traceback, place_of, same_folder

MOST = 2_000_000  # records of a function that is not told how many


def call(
    data: FunctionData, option: str, folders: Sequence[Path], split: Split, count: int | None
) -> tuple[str, list[Mapping[str, Any]]]:
    """What the function returns for this split, and how errors call it: by name, file and line.

    Args:
        data: names it.
        option: the table that the user set: `data`, or another one, whose problems are held out whatever
            split they are of.
        folders: with the user's own modules (`run.code`).
        split: given to it if it has such a parameter.
        count: likewise, where `data.count` is not set.

    Raises:
        RapoError: it cannot be found or called, fails, or returns something else than mappings.
    """
    function = load(data.problems, folders, f"{option}.problems")
    named = f'{option}.problems = "{data.problems}"'
    if not callable(function):
        raise RapoError(f"{named} is {shown(function, typed=False)}, which cannot be called; name a function")
    place = f"{data.problems} ({place_of(function)})"
    given = {"split": split, "seed": data.seed, "count": data.count if count is None else count}
    arguments = _arguments(function, given, place)
    if "seed" in data.model_fields_set and "seed" not in arguments:
        raise RapoError(
            f"{option}.seed = {data.seed} has no effect: {place} has no parameter seed; give it one, or "
            "remove the option"
        )
    if split == "test" and option.startswith("data") and "split" not in arguments:
        raise RapoError(
            f"{place} has no parameter split, so none of its problems are held out; give it one, which is "
            '"train" or "test", or name others in evaluate.data'
        )
    try:
        with same_folder():
            returned = function(**arguments)
            records = _taken(returned, data.count, place, option)
    except RapoError:
        raise
    except Exception as error:
        raise RapoError(f"{place} fails; mend it:\n{own_traceback(error)}") from error
    if not records:
        raise RapoError(f"{place} returns no problems; let it return at least one")
    return place, records


def _arguments(function: Any, given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Those of the given arguments that the function has parameters for."""
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        by_name = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if not optional and (name not in given or not by_name):
            raise RapoError(
                f"{place} has the parameter {name}, but only {', '.join(given)} are given, by name; give it "
                "a default"
            )
    return {name: value for name, value in given.items() if name in parameters}


def _taken(returned: Any, count: int | None, place: str, option: str) -> list[Mapping[str, Any]]:
    if inspect.iscoroutine(returned) or inspect.isasyncgen(returned):
        if inspect.iscoroutine(returned):
            returned.close()
        raise RapoError(f"{place} is async; make it a plain function")
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
        raise RapoError(
            f"{place} returns {shown(returned)}; let it return a list of "
            "mappings, one a problem, or yield them"
        )
    records = list(islice(returned, MOST + 1 if count is None else count))
    if len(records) > MOST:
        raise RapoError(f"{place} gives more than {MOST:,} problems; set {option}.count to how many to take")
    for row, record in enumerate(records):
        if not isinstance(record, Mapping) or not all(isinstance(name, str) for name in record):
            hint = '; of a DataFrame, return frame.to_dict("records")' if _is_frame(returned) else ""
            raise RapoError(
                f"{place}, row {row}, is {shown(record)}; let each be a "
                f"mapping like {{'question': …, 'answer': …}}{hint}"
            )
    return records


def _is_frame(returned: Any) -> bool:
    return type(returned).__name__ == "DataFrame"
