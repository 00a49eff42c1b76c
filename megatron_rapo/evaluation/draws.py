"""What the samples of each problem came to, whether their number was fixed or ended by outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.counts import codes
from megatron_rapo.evaluation.pass_at_k import pass_at_k
from megatron_rapo.evaluation.sequential import sequential_pass_at_k
from megatron_rapo.evaluation.store import Evaluation

Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Draws:
    """How many samples of each problem are correct, out of how many.

    Attributes:
        correct, samples: `[problems]`.
        most: the largest k that pass@k can be estimated for: the fewest samples of a problem, or N where a
            problem without enough correct samples runs to N.
        stop: correct samples at which a problem was done (`sequential`); None where the number was fixed.
    """

    correct: Integers
    samples: Integers
    most: int
    stop: int | None = None

    @classmethod
    def fixed(cls, correct: Integers, samples: Integers) -> Draws:
        """Of samples whose numbers did not depend on outcomes."""
        return cls(correct, samples, int(samples.min(initial=np.iinfo(np.int64).max)))

    def pass_at_k(self, k: int) -> Floats:
        """`[problems]` unbiased pass@k, k from 1 to `most`."""
        if self.stop is None:
            return pass_at_k(self.correct, self.samples, k)
        return sequential_pass_at_k((self.correct, self.samples), self.stop, k)


@dataclass(frozen=True)
class Tries:
    """Each problem's samples, one by one.

    Attributes:
        problems: ids.
        there: `[problems, N]`, which samples were drawn.
        right: `[problems, N]`, which of them are correct.
        stop: as in `Draws`.
    """

    problems: tuple[str, ...]
    there: Flags
    right: Flags
    stop: int | None = None

    def part(self, *, problems: Flags | None = None, numbers: slice | None = None) -> Tries:
        """The samples of some problems, `[problems]`, or of some numbers.

        Of an adaptive budget the later numbers are such a budget again for problems that had no correct
        sample before.
        """
        rows = np.ones(len(self.problems), dtype=bool) if problems is None else problems
        columns = slice(None) if numbers is None else numbers
        return replace(
            self,
            problems=tuple(name for name, chosen in zip(self.problems, rows, strict=True) if chosen),
            there=self.there[rows, columns],
            right=self.right[rows, columns],
        )

    def draws(self) -> Draws:
        """Counts; of an adaptive budget without what was drawn after a problem was done.

        Raises:
            RapoError: a problem of an adaptive budget is still open.
        """
        if self.stop is None:
            return Draws.fixed(self.right.sum(axis=1), self.there.sum(axis=1))
        most = self.there.shape[1]
        reached = np.cumsum(self.right, axis=1) >= self.stop
        drawn = np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, most)
        wanted = np.arange(most) < drawn[:, None]
        still_open = (wanted & ~self.there).any(axis=1)
        if still_open.any():
            raise RapoError(
                f"problem {self.problems[int(still_open.argmax())]} is still open: it has neither "
                f"{self.stop} correct samples nor {most} in all; finish the evaluation (run the same command "
                "again)"
            )
        return Draws((self.right & wanted).sum(axis=1), drawn, most, self.stop)


def tries(samples: pyarrow.Table, problems: Sequence[str], most: int, stop: int | None = None) -> Tries:
    """Sorts stored samples by problem and number.

    Args:
        samples: columns problem, sample and outcome of a store.
        problems: ids.
        most: N.
        stop: as in `Draws`.
    """
    samples = samples.unify_dictionaries()  # parts have dictionaries of their own
    rows = codes(samples["problem"], {name: place for place, name in enumerate(problems)})
    outcomes = codes(samples["outcome"], {outcome.value: place for place, outcome in enumerate(Outcome)})
    numbers = samples["sample"].to_numpy()
    there = np.zeros((len(problems), most), dtype=bool)
    right = np.zeros_like(there)
    there[rows, numbers] = True
    right[rows, numbers] = outcomes == list(Outcome).index(Outcome.CORRECT)
    return Tries(tuple(problems), there, right, stop)


def stored_tries(evaluation: Evaluation, data: str, setting: str) -> Tries:
    """The samples of a data set at a setting."""
    store = evaluation.samples(data, setting)
    return tries(
        store.read(["problem", "sample", "outcome"]),
        [problem.id for problem in store.problems],
        evaluation.manifest.samples,
        evaluation.manifest.adaptive,
    )
