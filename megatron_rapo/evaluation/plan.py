"""What is still to be sampled, in batches of about one size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass

from megatron_rapo.data.prompts import Prompt

BLOCK = 64  # samples of a problem in one batch: enough to share a prompt's computation


@dataclass(frozen=True)
class Batch:
    """Samples `first` to `first + count - 1` of each prompt."""

    prompts: tuple[Prompt, ...]
    first: int
    count: int


def plan(
    prompts: Sequence[Prompt],
    samples: int,
    present: Set[tuple[str, int]],
    *,
    rows: int,
    is_open: Callable[[str], bool] = lambda problem: True,
) -> Iterator[Batch]:
    """Batches that bring every prompt to `samples`, none with a sample that is present.

    All prompts get their first samples before any gets its last, so that what a kill leaves says as much of
    one problem as of another.

    Args:
        samples: N.
        present: (problem id, sample number) of what is there.
        rows: most samples of one batch.
        is_open: whether a problem, by id, is to get more; asked before each block of its samples.
    """
    block = min(BLOCK, samples, rows)
    for start in range(0, samples, block):
        runs: dict[tuple[int, int], list[Prompt]] = defaultdict(list)
        for prompt in filter(lambda prompt: is_open(prompt.id), prompts):
            numbers = range(start, min(start + block, samples))
            for run in _runs([n for n in numbers if (prompt.id, n) not in present]):
                runs[run].append(prompt)
        for (first, count), missing in runs.items():
            size = max(1, rows // count)
            for i in range(0, len(missing), size):
                yield Batch(tuple(missing[i : i + size]), first, count)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs
