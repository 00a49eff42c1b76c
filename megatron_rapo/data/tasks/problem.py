"""What a generated task is made of, and how its problems are drawn and split."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_rapo.errors import RapoError

Split = Literal["train", "test"]

_TEST_SHARE = 16  # one key in so many belongs to the test split
_STALE_DRAWS = 100_000  # so many draws in a row without a new problem: there are no more


@dataclass(frozen=True)
class Problem:
    """One generated problem.

    Attributes:
        question: the prompt's text; the response follows it directly.
        answer: what the task's checker needs, in the task's own notation.
        parts: what the problem was made of, by name.
    """

    question: str
    answer: str
    parts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def columns(self) -> Mapping[str, Any]:
        """Those that a row of a file would have."""
        return {"question": self.question, "answer": self.answer, **self.parts}


def split_of(key: str) -> Split:
    """The split that a problem belongs to: a fixed hash of its key, whatever the seed."""
    return "test" if zlib.crc32(key.encode()) % _TEST_SHARE == 0 else "train"


def distinct(
    draw: Callable[[], tuple[str, Problem] | None],
    split: Split,
    count: int,
    task: str,
    stale: int = _STALE_DRAWS,
) -> list[Problem]:
    """Draws until `count` problems of the split with different questions are found.

    Args:
        draw: returns a problem with the key that decides its split, or None for a draw to be thrown away.
        split: which problems to keep; the splits share no key.
        count: how many.
        task: the task and its options, for the error's text.
        stale: so many draws in a row without a new problem mean that there are no more.

    Raises:
        RapoError: where the task does not hold so many problems.
    """
    found: dict[str, Problem] = {}
    waited = 0
    while len(found) < count:
        drawn = draw()
        if drawn is not None and split_of(drawn[0]) == split and drawn[1].question not in found:
            found[drawn[1].question] = drawn[1]
            waited = 0
        elif (waited := waited + 1) == stale:
            raise RapoError(
                f"{task}: {count} {split} problems were asked for, but only {len(found)} could be found; "
                f"ask for at most {len(found)}, or widen the task by its options"
            )
    return list(found.values())
