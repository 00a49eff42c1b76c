"""Errors with options by the names under which `megatron-rapo evaluate` was told them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_rapo.config import RunConfig
from megatron_rapo.config.options import sections_of

_SOURCES = sections_of(RunConfig.model_fields["data"].annotation)
_ALONE = r"(?<![\w./-])"  # before the name of an option, and no part of a path


def as_typed(
    message: str,
    flags: Mapping[str, str],
    *,
    tables: Sequence[Mapping[str, object]],
    settings: Sequence[str],
    stands_in: bool,
) -> str:
    """An error's text with options as they were typed.

    Args:
        flags: by option, such as `model.path`, that of the command line which says it.
        tables: what --data gave.
        settings: `section.key=value` of --set; these options keep their names.
        stands_in: whether there was no configuration, so that the first of the tables is its `data`, too.
    """
    set_by_name = {setting.partition("=")[0].strip() for setting in settings}
    if stands_in:
        message = message.replace("configuration --set is not valid", "the command line is not valid")
    if tables:
        message = _of_tables(message, tables, set_by_name, stands_in=stands_in)
    for option, flag in flags.items():
        if option not in set_by_name:
            message = re.sub(rf"{_ALONE}{re.escape(option)}(?![\w.])", flag, message)
    return "\n".join(dict.fromkeys(message.splitlines()))


def _of_tables(
    message: str, tables: Sequence[Mapping[str, object]], set_by_name: set[str], *, stands_in: bool
) -> str:
    of_evaluation = r"evaluate\.data(?:\[\d+\])?"
    lines = message.splitlines()
    if stands_in and any(line.startswith("  evaluate.data") for line in lines):
        lines = [line for line in lines if not line.startswith("  data.")]  # the same, of what stands in
    message = "\n".join(lines)
    table = _ALONE + (rf"(?:{of_evaluation}|data)" if stands_in else of_evaluation)
    names = {name for source in _SOURCES for name in source.model_fields} | {k for one in tables for k in one}
    option = rf"{table}\.((?:{'|'.join(map(re.escape, sorted(names)))})(?:\.\w+)*)(?![\w.])"

    def of_table(found: re.Match[str]) -> str:
        return found[0] if found[0] in set_by_name else f"{found[1]} of --data's table"

    message = re.sub(rf", or --set '{option}[^\n]*", "", message)
    message = re.sub(rf'{table}\.template = "(\w+)"', r"--template \1", message)
    message = re.sub(rf"{table}\.path(?![\w.])", "--data", message)
    message = re.sub(option, of_table, message)
    return re.sub(rf"{_ALONE}{of_evaluation}(?![\w.])", "--data", message)
