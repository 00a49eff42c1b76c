"""Which of a run's samples are shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.samples.store import FOLDER, read_step, steps_of

KINDS: dict[str, tuple[Outcome, ...]] = {
    "right": (Outcome.CORRECT,),
    "wrong": (Outcome.WRONG,),
    "unknown": tuple(outcome for outcome in Outcome if not outcome.known),
}
_LISTED = 10  # problems in a message


@dataclass(frozen=True)
class Chosen:
    """Samples of a step.

    Attributes:
        rows: as `store.read_step` gives them.
        matching: how many there are; `rows` are the first of these.
        outcomes: of all samples of the step, how many of each kind.
    """

    step: int
    rows: list[dict[str, Any]]
    matching: int
    outcomes: dict[str, int]


def choose(run: Path, *, step: int | None, kind: str | None, problem: str | None, count: int) -> Chosen:
    """The first `count` samples of a step, by the order of its prompts.

    Args:
        run: its directory.
        step: None: the newest that has samples.
        kind: of `KINDS`; None: all.
        problem: its id; None: all.
        count: at most.

    Raises:
        RapoError: there is no such run, step, problem or sample, or a file is damaged.
    """
    files = _files(run)
    step = max(files) if step is None else step
    if step not in files:
        raise RapoError(f"{run} has no samples of step {step}; choose one of {_ranges(list(files))}")
    brief = read_step(files[step], ["draw", "number", "problem", "outcome"])
    outcomes = Counter(row["outcome"] for row in brief)
    by_kind = {name: sum(outcomes[one] for one in of_kind) for name, of_kind in KINDS.items()}
    problems = list(dict.fromkeys(row["problem"] for row in brief))
    if problem is not None and problem not in problems:
        more = f", … ({len(problems)} in all)" if len(problems) > _LISTED else ""
        raise RapoError(
            f"step {step} of {run} has no problem {problem!r}; choose one of "
            f"{', '.join(problems[:_LISTED])}{more}, or another --step"
        )
    wanted = {
        (row["draw"], row["number"])
        for row in brief
        if (problem is None or row["problem"] == problem) and (kind is None or row["outcome"] in KINDS[kind])
    }
    if not wanted:
        told = ", ".join(f"{number} {name}" for name, number in by_kind.items())
        of_problem = "" if problem is None else f" to problem {problem}"
        raise RapoError(
            f"step {step} of {run} has no {kind} response{of_problem}; of the step's responses are {told}: "
            f"leave --{kind} out, or choose another --step"
        )
    rows = read_step(files[step], only=set(sorted(wanted)[:count]))
    return Chosen(step, rows, len(wanted), by_kind)


def _files(run: Path) -> dict[int, list[Path]]:
    if not run.is_dir():
        raise RapoError(f"{run} is no directory; give a run's, which `megatron-rapo train` wrote to")
    if files := steps_of(run):
        return files
    if not (run / "config.toml").is_file():
        raise RapoError(f"{run} is no run (it has no config.toml); give a directory of `megatron-rapo train`")
    raise RapoError(
        f"{run} has no samples (nothing in {FOLDER}/); they are written with each step, unless "
        "observe.samples_every leaves it out"
    )


def _ranges(steps: Sequence[int]) -> str:
    """Numbers as people write them: `1 to 5, 8`."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and parts[-1][-1] == step - 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
