"""How long responses are: drawn from recorded ones, given ones, or a plan's exponential."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_rapo.errors import RapoError
from megatron_rapo.planning.workload import Workload
from megatron_rapo.samples.store import read_step, steps_of
from megatron_rapo.timeline.simulated import refuse_simulated

Integers = npt.NDArray[np.int64]
_GRID = 4096  # lengths at which an exponential is looked at


@dataclass(frozen=True)
class Lengths:
    """Groups of responses to draw from.

    Attributes:
        groups: lengths in tokens, of each recorded group.
        rewards: likewise; None where they are not known.
        source: where they come from, for people.
        belong_together: whether groups are; else they are one, of responses that each are drawn alone.
    """

    groups: Sequence[Integers]
    rewards: Sequence[npt.NDArray[np.float64]] | None
    source: str
    belong_together: bool = True

    @property
    def mean(self) -> float:
        """Tokens of a response."""
        return float(np.concatenate(self.groups).mean())

    def draw(
        self, random: np.random.Generator, counts: Sequence[int], longest: int
    ) -> tuple[list[Integers], list[npt.NDArray[np.float64]] | None]:
        """Groups of so many responses each, none above `longest` tokens; and their rewards, where known.

        A recorded group is taken as a whole, since responses to one prompt are alike in length; for a group
        of another size, so many are drawn from it, with replacement.
        """
        if not self.belong_together:
            values = np.minimum(np.concatenate(self.groups), longest)
            drawn = values[random.integers(len(values), size=sum(counts))]
            return np.split(drawn, np.cumsum(counts)[:-1]), None
        places = random.integers(len(self.groups), size=len(counts))
        orders = [
            random.permutation(count)
            if len(self.groups[place]) == count
            else random.integers(len(self.groups[place]), size=count)
            for place, count in zip(places, counts, strict=True)
        ]
        pairs = list(zip(places, orders, strict=True))
        rewards = None if self.rewards is None else [self.rewards[place][order] for place, order in pairs]
        return [np.minimum(self.groups[place][order], longest) for place, order in pairs], rewards


def exponential(workload: Workload) -> Lengths:
    """Those that a plan is made with: exponential, cut at the longest (`Workload.still_running`)."""
    tokens = np.linspace(0, workload.longest, min(_GRID, workload.longest) + 1)
    running = np.array([workload.still_running(one) for one in tokens])
    shares = (np.arange(_GRID) + 0.5) / _GRID
    # The share that is still running falls; a length is where it falls below a share.
    lengths = np.interp(-shares[::-1], -running, tokens)
    rounded = np.maximum(1, np.rint(lengths)).astype(np.int64)
    source = f"exponential, {workload.response_tokens:g} tokens in the mean, cut at {workload.longest}"
    return Lengths([rounded], None, source, belong_together=False)


def read_lengths(path: Path) -> Lengths:
    """Those of a run's samples (a folder), or of a file of whole numbers.

    Raises:
        RapoError: there are none, or what is there is none.
    """
    if not path.is_dir():
        return _of_file(path)
    refuse_simulated(path, "name a run that sampled")
    groups: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for step, files in steps_of(path).items():
        for row in read_step(files, ["draw", "number", "length", "reward"]):
            reward = math.nan if row["reward"] is None else row["reward"]
            groups.setdefault((step, row["draw"]), []).append((row["length"], reward))
    found = [(length, rewards) for length, rewards in map(_columns, groups.values()) if len(length)]
    if not found:
        raise RapoError(
            f"--lengths {path} has no recorded samples; name a run with observe.samples_every above 0, or a "
            "file of lengths"
        )
    kept = [length for length, _ in found]
    return Lengths(kept, [rewards for _, rewards in found], f"{len(kept)} groups of {path}")


def _columns(rows: Sequence[tuple[int, float]]) -> tuple[Integers, npt.NDArray[np.float64]]:
    """Responses without a token are no work, and left out."""
    kept = [row for row in rows if row[0] > 0]
    return np.array([row[0] for row in kept], np.int64), np.array([row[1] for row in kept])


def _of_file(path: Path) -> Lengths:
    try:
        words = path.read_text(encoding="utf-8").split()
        lengths = [int(word) for word in words]
    except (OSError, ValueError) as error:
        raise RapoError(
            f"--lengths {path} cannot be read: {error}; name a run's folder, or a file of whole numbers, the "
            "tokens of a response each"
        ) from error
    if not lengths:
        raise RapoError(f"--lengths {path} has no length; give the tokens of a response in each line")
    if min(lengths) < 1:
        raise RapoError(f"--lengths {path} has {min(lengths)}, and a response has a token or more; remove it")
    told = f"{len(lengths)} lengths of {path}"
    return Lengths([np.array(lengths)], None, told, belong_together=False)
