"""Numbers that users' own code tells: finite ones, by names under which they can be logged."""

from __future__ import annotations

import math
import numbers
import re
import reprlib
from collections.abc import Collection, Mapping

from megatron_rapo.errors import RapoError

LARGEST_REWARD = 1e30
"""Of either sign; squares of larger ones overflow where rewards are compared in float32."""

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
        if not isinstance(name, str):
            raise RapoError(f"{told} returned a {what} by the name {shown(name)}; let names be texts")
        if not NAME.fullmatch(name) or name in taken:
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
        checked[str.__str__(name)] = number  # no subclass, which other processes could not import
    return checked


def checked_reward(reward: float, told: str) -> float:
    """A reward that can be compared with others.

    Raises:
        RapoError: it is too large.
    """
    if not abs(reward) <= LARGEST_REWARD:
        raise RapoError(
            f"{told} came to the reward {reward:g}, and rewards are from {-LARGEST_REWARD:g} to "
            f"{LARGEST_REWARD:g}; scale it"
        )
    return reward


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
    except Exception:  # it is too large; or of a class of the user's own, which does what it likes
        return None
    return number if math.isfinite(number) else None


def shown(value: object, *, typed: bool = True) -> str:
    """A value and its type, for errors."""
    try:
        text = reprlib.repr(value)
    except Exception:  # an integer of more digits than Python writes; or a class's own fault
        text = "a value that cannot be shown"
    return f"{text} ({type(value).__name__})" if typed else text
