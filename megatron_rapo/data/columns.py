"""The columns of a row: as plain Python values, and found by their names."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np

_PLAIN = (str, int, float, bool, type(None), bytes, Decimal, date, time, timedelta)


class NotPlain(Exception):
    """A value that is no text, number, date, list or mapping of such."""


def plain(value: Any) -> Any:
    """The value with NumPy's arrays as lists, its scalars as numbers, and mappings as dicts, however deep.

    Rewards are given columns in other processes, and fingerprints are made of them; objects with code of
    their own will not do for that.

    Raises:
        NotPlain: it is something else.
    """
    if isinstance(value, np.generic):
        return plain(value.item())
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.ndarray):
        return [plain(one) for one in value.tolist()]
    if isinstance(value, Mapping):
        return {_key(key): plain(inner) for key, inner in value.items()}
    if type(value) is tuple:
        return tuple(map(plain, value))
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, date | Decimal):  # datetime, and pandas' own
        return value
    raise NotPlain(f"{value!r:.100} of type {type(value).__name__}")


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


def _key(key: Any) -> str | int:
    if isinstance(key, str):
        return str(key)
    if isinstance(key, int | np.integer):
        return int(key)
    raise NotPlain(f"a mapping with the key {key!r:.60} of type {type(key).__name__}")
