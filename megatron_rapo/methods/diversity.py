"""How different the members of a set of responses are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def distinct_share(members: Sequence[Hashable | None]) -> float:
    """How many different ones there are, as a share of all; None is none: `[a, a, b, None]` are 2 of 4."""
    return len({member for member in members if member is not None}) / len(members)
