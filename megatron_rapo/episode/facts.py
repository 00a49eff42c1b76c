"""Numbers that users' own code tells: finite ones, by names under which they can be logged."""

from __future__ import annotations

import math
import numbers
import re
import reprlib
from collections.abc import Collection, Mapping

from megatron_rapo.errors import RapoError

NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
"""What a number may be called."""


def checked_facts(
    facts: object,
    told: str,
    *,
    group: str,
    what: str = "fact",
    taken: Collection[str] = (),
) -> dict[str, float]:
    """What was told, as numbers that can be logged as `group/name`.

    Args:
        facts: of a `Score`, of an episode, or of a method.
        told: who told them, for errors.
        group: `reward`, `environment` or `method`.
        what: what one is called, for errors.
        taken: names that other metrics of the group have.

    Raises:
        RapoError: one has a name that cannot be logged, or is no finite number.
    """
    if not isinstance(facts, Mapping):
        raise RapoError(f"{told} returned the {what}s {shown(facts)}; give a dict of numbers by name")
    checked: dict[str, float] = {}
    for name, fact in facts.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in taken:
            raise RapoError(
                f"{told} returned a {what} by the name {name!r}, which cannot be logged as "
                f"{group}/{name}; {'that is another metric: ' if name in taken else ''}give it another "
                "name, of letters, digits, dots, hyphens and underscores"
            )
        if (number := finite_number(fact)) is None:
            raise RapoError(
                f"{told} returned the {what} {name!r} = {shown(fact)}; give a finite number, or "
                "leave it out where there is none"
            )
        checked[name] = number
    return checked


def finite_number(value: object) -> float | None:
    """A finite number of Python or NumPy as a float; None for all else, arrays of one number included."""
    kind = type(value)
    if not isinstance(value, numbers.Real) and (kind.__module__, kind.__name__.rstrip("_")) != (
        "numpy",
        "bool",
    ):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def shown(value: object) -> str:
    """A value and its type, for errors."""
    return f"{reprlib.repr(value)} ({type(value).__name__})"
