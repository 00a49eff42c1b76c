"""The columns of a row: as plain Python values, and found by their names."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np

from megatron_rapo.episode.facts import shown

_PLAIN = (bool, type(None), bytes, time, timedelta)
_DEEPEST = 100  # levels, less than what Python's own pickle and JSON can write
_BLANK = ("NaTType", "NAType")  # pandas' own


class NotPlain(Exception):
    """What is wrong with a value, and the remedy, in words that go on from the name of the row."""


def plain(value: Any, name: str = "", within: tuple[int, ...] = ()) -> Any:
    """The value with NumPy's arrays as lists, its scalars as numbers, and mappings as dicts, however deep.

    Rewards are given columns in other processes, fingerprints are made of them, and programs get them as
    JSON; objects with code of their own will not do for that. NaN is what Parquet and pandas write for a
    blank, and becomes None.

    Args:
        value: of a column, or a row with all its columns.
        name: of the column, for errors; dots lead inwards.
        within: ids of what holds the value, by which one that holds itself is found.

    Raises:
        NotPlain: it is, or holds, something else; an infinite number, an integer that cannot be written, half
            of a surrogate pair; or it holds itself.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = _of_numpy(value)
    if isinstance(value, Mapping | list) or type(value) is tuple:
        return _nested(value, name, within)
    return _single(value, name)


def find(record: Mapping[str, Any], name: str) -> Any:
    """The column of this name; if there is none, what its dots lead to; None where that is missing."""
    if name in record:
        return record[name]
    value: Any = record
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def has(record: Mapping[str, Any], name: str) -> bool:
    """Whether the column is there, if only as null."""
    outer, _, last = name.rpartition(".")
    parent = find(record, outer) if outer else record
    return name in record or (isinstance(parent, Mapping) and last in parent)


def _nested(value: Any, name: str, within: tuple[int, ...]) -> Any:
    """A mapping, a list or a tuple."""
    if id(value) in within:
        raise NotPlain(f"{_column(name)} a value that contains itself; give each row values of its own")
    if len(within) > _DEEPEST:
        raise NotPlain(f"{_column(name)} values nested more than {_DEEPEST} deep; flatten them")
    inside = (*within, id(value))
    if isinstance(value, Mapping):
        named = {_key(key, name): inner for key, inner in value.items()}
        if len({type(key) for key in named}) > 1:
            raise NotPlain(f"{_column(name)} a mapping with texts and integers as keys; use texts alone")
        outer = f"{name}." if name else ""
        return {key: plain(inner, f"{outer}{key}", inside) for key, inner in named.items()}
    items = [plain(item, f"{name}[{place}]", inside) for place, item in enumerate(value)]
    return items if isinstance(value, list) else tuple(items)


def _single(value: Any, name: str) -> Any:
    if type(value) is str:
        return _text(value, name)
    if type(value) is int:
        return _integer(value, name)
    if type(value) is float or isinstance(value, Decimal):
        return _number(value, name)
    if type(value).__name__ in _BLANK and type(value).__module__.startswith("pandas."):
        return None
    if type(value) in _PLAIN or isinstance(value, date):  # datetime, and pandas' own
        return value
    raise NotPlain(
        f"{_column(name)} {shown(value)}, which rewards in other processes "
        "cannot be given; use text, numbers, dates, lists and mappings"
    )


def _of_numpy(value: np.generic | np.ndarray[Any, Any]) -> Any:
    if value.dtype.kind in "mM":  # in Python's microseconds; of nanoseconds it makes bare numbers
        value = value.astype(f"{value.dtype.kind}8[us]")
    return value.tolist()


def _key(key: Any, name: str) -> str | int:
    if isinstance(key, str):
        return _text(str(key), name)
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return _integer(int(key), name)
    raise NotPlain(f"{_column(name)} a mapping with the key {shown(key)}; use texts as keys")


def _text(text: str, name: str) -> str:
    """JSON can write half of a surrogate pair, which is no character and cannot be stored or tokenized."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NotPlain(
            f"{_column(name)} {text[error.start]!a} at character {error.start}, half of a surrogate pair and "
            "no character; correct or remove the row"
        ) from error
    return text


def _integer(number: int, name: str) -> int:
    digits = sys.get_int_max_str_digits()
    if number.bit_length() > math.log2(10) * digits > 0:
        raise NotPlain(
            f"{_column(name)} an integer of more than {digits:,} digits, which Python does not write; "
            "give it as a text"
        )
    return number


def _number(number: float | Decimal, name: str) -> float | Decimal | None:
    if math.isnan(number):
        return None
    if math.isinf(number):
        raise NotPlain(
            f"{_column(name)} {number}, no finite number, which JSON cannot write; correct or remove the row"
        )
    return number


def _column(name: str) -> str:
    return f": field {name[:60]!a} has" if name else " has"
