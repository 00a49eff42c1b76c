"""Seeds that were added until the primary contrast's interval was narrow: `looks.json`.

To look and to stop is to choose by data. Here the choice is by the interval's width alone, never by where
it lies: of normal values mean and spread are independent, so that the mean stays unbiased. What suffers is
coverage, since a spread that is small by chance stops too early (Chow and Robbins 1965). Against it, no look
counts before FIRST_LOOK seeds, and AFTERWARDS more are run after the rule is first met (Hall 1983 adds a
fixed number of observations). `tools/bench_studies.py` measures what is left.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole
from megatron_rapo.study.crossed import Crossed

FILE = "looks.json"
FIRST_LOOK = 5  # seeds
AFTERWARDS = 1  # seeds


@dataclass(frozen=True)
class Look:
    """One look at the primary contrast.

    Attributes:
        seeds: that the contrast was over.
        target: width that was asked for.
        mean, low, high: of the contrast.
        decision: what followed.
        added: seeds, to all arms.
    """

    seeds: int
    target: float
    mean: float
    low: float
    high: float
    decision: str
    added: Sequence[int]

    @property
    def width(self) -> float:
        """Of the interval."""
        return self.high - self.low


def read_looks(folder: Path) -> list[Look]:
    """Oldest first; none where no seed was added.

    Raises:
        RapoError: the file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return []
    try:
        return [Look(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise RapoError(
            f"{file} is no record of looks ({error!r}); restore it: which seeds were added stands there alone"
        ) from error


def write_looks(folder: Path, looks: Sequence[Look]) -> None:
    """Writes the record anew, whole."""
    write_whole(folder / FILE, json.dumps([asdict(look) for look in looks], indent=1) + "\n")


def enough(looks: Sequence[tuple[int, float]], target: float) -> bool:
    """Whether no more seeds are needed.

    Args:
        looks: seeds and the interval's width at each, oldest first.
        target: width that is asked for.
    """
    met = next((seeds for seeds, width in looks if seeds >= FIRST_LOOK and width <= target), None)
    return met is not None and looks[-1][0] >= met + AFTERWARDS


def out_of_reach(difference: Crossed, target: float) -> bool:
    """Whether problems alone keep the interval wider, however many seeds there are."""
    return difference.width * (1 - difference.seed_share) ** 0.5 > target


def seeds_of(study_seeds: Sequence[int], looks: Sequence[Look]) -> list[int]:
    """The study's seeds, and those that were added."""
    added = [seed for look in looks for seed in look.added]
    return list(dict.fromkeys([*study_seeds, *added]))
