"""A problem as rewards, environments and methods see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem(Mapping[str, Any]):
    """One problem: a mapping of all columns of its row in the data.

    ```python
    problem["difficulty"]        # a column
    problem.answer               # the gold answer, whatever its column is called
    ```

    Attributes:
        id: what its source calls it, or else its row.
        question: as the source gives it.
        answer: the gold answer; empty where the data have none.
        source: the name of its data set.
        token_ids: the templated prompt.
        columns: all columns of the row.
    """

    id: str
    question: str
    answer: str = ""
    source: str = ""
    token_ids: tuple[int, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, column: str) -> Any:
        try:
            return self.columns[column]
        except KeyError:
            there = ", ".join(self.columns) or "none"
            raise KeyError(f"problem {self.id} has no column {column!r}; its columns: {there}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)
