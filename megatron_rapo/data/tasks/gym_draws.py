"""Draws problems of reasoning_gym: `python -m megatron_rapo.data.tasks.gym_draws`, as a process of its own.

Some of its datasets (`word_ladder`, `isomorphic_strings`, …) draw by the order of sets of texts, which
differs from process to process unless PYTHONHASHSEED is fixed before Python starts. Ranks must have the same
problems, and so must a run that goes on.

Reads a request as JSON from stdin; writes a pickle to stdout: the problems, or a text of what is wrong.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import pickle
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_rapo.data.tasks.problem import Problem, Split, distinct
from megatron_rapo.errors import RapoError

CHUNK = 500  # problems of one seed: some datasets choose all their tasks when they are made, by their size
_STALE_DRAWS = 2_000  # in a row without a new problem; draws are slow here, and tasks are small or huge


@dataclass(frozen=True)
class Request:
    """What to draw: `count` problems of a split of a dataset, by its own options."""

    dataset: str
    options: dict[str, Any]
    seed: int
    split: Split
    count: int


def draw(request: Request) -> list[Problem]:
    """Different problems, the same for the same request under the same PYTHONHASHSEED.

    A problem's split hangs on its question, and the splits are drawn by different seeds.

    Raises:
        RapoError: there is no such dataset, it refuses the options, or holds too few problems.
    """
    entries = _entries(request)

    def one() -> tuple[str, Problem]:
        entry = next(entries)
        answer = "" if entry["answer"] is None else str(entry["answer"])
        made = {"dataset": request.dataset, "options": request.options}
        problem = Problem(entry["question"], answer, {**entry, **made})
        return problem.question, problem

    task = f"{request.dataset} ({request.options})"
    return distinct(one, request.split, request.count, task, stale=_STALE_DRAWS)


def make_dataset(name: str, options: dict[str, Any], **size_and_seed: int) -> Any:
    """The dataset with its options.

    Raises:
        RapoError: there is none of this name, or it refuses an option.
    """
    from reasoning_gym.factory import DATASETS, create_dataset

    if name == "composite":
        raise RapoError('dataset = "composite" is a mixture; use data.source = "mixture"')
    if name not in DATASETS:
        near = ", ".join(difflib.get_close_matches(name, DATASETS, n=3))
        remedy = f"did you mean {near}?" if near else "its README lists them"
        raise RapoError(f'dataset = "{name}" is none of reasoning_gym\'s {len(DATASETS)}; {remedy}')
    known = [one.name for one in dataclasses.fields(DATASETS[name][1]) if one.name not in ("size", "seed")]
    for option in options:
        if option not in known:
            raise RapoError(
                f"options has {option!r}, which {name} has not; it has {', '.join(known) or 'none'} (seed "
                "and size are data.seed and data.problems)"
            )
    try:
        return create_dataset(name, **options, **size_and_seed)
    except Exception as error:  # its own checks are assertions; and a wrong type may fail in every way
        raise RapoError(f"options = {options} are refused by {name}: {error!r}; correct them") from error


def _entries(request: Request) -> Iterator[dict[str, Any]]:
    chunk = 0
    while True:
        seed = zlib.crc32(f"{request.dataset} {request.split} {request.seed} {chunk}".encode()) >> 1
        dataset = make_dataset(request.dataset, request.options, size=CHUNK, seed=seed)
        yield from (dataset[place] for place in range(CHUNK))
        chunk += 1


def main() -> None:
    """Answers one request."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        found: list[Problem] | str = draw(Request(**json.load(sys.stdin)))
    except RapoError as error:
        found = str(error)
    with answers:
        pickle.dump(found, answers)


if __name__ == "__main__":
    main()
