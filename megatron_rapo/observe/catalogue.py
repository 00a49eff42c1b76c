"""What each metric of a run means, as `metrics.toml` records it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("metrics.toml")
_SIGNS = {"[": "(?:", "|": "|", "]": ")?"}


@dataclass(frozen=True)
class Metric:
    """A metric, or several of one kind.

    Attributes:
        name: as it is logged; `<…>` stands for a name or number, `[a|b]` for a part that may be a, b or
            missing.
        unit: of its values.
        over: what a value is the mean of, or where it is of.
        meaning: a sentence; or two.
        wrong: how it looks wrong, and what to do then.
        own: whether the name is the user's own.
    """

    name: str
    unit: str
    over: str
    meaning: str
    wrong: str
    own: bool = False

    @property
    def group(self) -> str:
        """What stands before the first slash."""
        return self.name.partition("/")[0]

    def names(self, logged: str) -> bool:
        """Whether a metric that was logged under this name is one of these."""
        parts = re.split(r"(<\w+>|[\[\]|])", self.name)
        pattern = "".join(_SIGNS.get(part, "[^/]+" if part[:1] == "<" else re.escape(part)) for part in parts)
        return re.fullmatch(pattern, logged) is not None


@cache
def metrics() -> tuple[Metric, ...]:
    """All metrics, in the record's order."""
    return tuple(
        Metric(**{key: _one_line(value) for key, value in entry.items()}) for entry in _read()["metrics"]
    )


@cache
def groups() -> Mapping[str, str]:
    """What is common to the metrics of each group, by the group's name."""
    return {name: _one_line(entry["about"]) for name, entry in _read()["groups"].items()}


def recorded(name: str) -> list[Metric]:
    """The entries that a logged metric may have: its own first, then that of users' own names."""
    return sorted((metric for metric in metrics() if metric.names(name)), key=lambda metric: metric.own)


@cache
def _read() -> Mapping[str, Any]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


def _one_line(value: Any) -> Any:
    return " ".join(value.split()) if isinstance(value, str) else value
