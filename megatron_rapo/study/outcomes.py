"""Outcomes of runs, problem by problem, from their results."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.pass_at_k import pass_at_k
from megatron_rapo.study.results import Judged, Result
from megatron_rapo.study.schema import Outcome

Floats = npt.NDArray[np.float64]

# Of the problems that a study is judged on: so many may chance to be among those of its search.
MOST_SEEN = 0.1


def judged(result: Result, outcome: Outcome) -> tuple[str, Judged]:
    """The data set and setting that the outcome is of.

    Raises:
        RapoError: the run was not judged on it, or on several without one being named.
    """
    if outcome.data is not None:
        name = f"{outcome.data}/{outcome.setting}"
        if name in result.judged:
            return name, result.judged[name]
    elif len(result.judged) == 1:
        return next(iter(result.judged.items()))
    asked = "an outcome without DATA/SETTING" if outcome.data is None else f"{outcome.data}/{outcome.setting}"
    raise RapoError(
        f"{result.run} was judged on {', '.join(result.judged)}, and the study asks for {asked}; name one of "
        "these in outcome"
    )


def values(result: Result, outcome: Outcome) -> Floats:
    """`[problems]`: pass@k or mean reward of each.

    Raises:
        RapoError: a problem has fewer samples than k, or rewards are right or wrong alone, or unknown.
    """
    name, one = judged(result, outcome)
    if outcome.k is not None:
        fewest = min(one.samples)
        if outcome.k > fewest:
            raise RapoError(
                f"{result.run} has {fewest} samples of a problem of {name}, too few for pass@{outcome.k}; "
                "ask for a smaller k, or evaluate with more samples"
            )
        return pass_at_k(np.array(one.correct), np.array(one.samples), outcome.k)
    if one.reward is None:
        return np.array(one.correct) / np.array(one.samples)
    if any(reward is None for reward in one.reward):
        raise RapoError(
            f"{result.run} has problems of {name} without a known reward; see why (timeout, crash), or take "
            "pass@1 as the outcome, where these count as not correct"
        )
    return np.array(one.reward, dtype=float)


def mean_outcome(result: Result, outcome: Outcome) -> float:
    """The mean over problems."""
    return float(values(result, outcome).mean())


def check_same_problems(results: Sequence[Result], outcome: Outcome) -> None:
    """Raises RapoError where two runs were judged on other problems."""
    first = judged(results[0], outcome)[1].problems if results else []
    for one in results:
        name, mine = judged(one, outcome)
        if list(mine.problems) != list(first):
            raise RapoError(
                f"{one.run} and {results[0].run} were judged on different problems of {name}; they cannot be "
                "paired: give all arms the same evaluation data, and remove the results of another"
            )


def unseen(search: Sequence[Result], final: Sequence[Result]) -> tuple[list[Result], int]:
    """The final runs' results without the problems that the search saw as well, and how many these were.

    Raises:
        RapoError: they were more than MOST_SEEN of those that the study is judged on.
    """
    seen = {problem for one in search for part in one.judged.values() for problem in part.problems}
    held_out = {problem for one in final for part in one.judged.values() for problem in part.problems}
    both = seen & held_out
    if len(both) > MOST_SEEN * len(held_out):
        raise RapoError(
            f"{len(both)} of the {len(held_out)} problems that the study is judged on were seen by its "
            "search; give tuning.options.evaluate.data problems of its own (another seed, another file)"
        )
    if not both:
        return list(final), 0
    return [
        replace(one, judged={name: _without(part, both) for name, part in one.judged.items()})
        for one in final
    ], len(both)


def _without(part: Judged, problems: Set[str]) -> Judged:
    kept = [place for place, problem in enumerate(part.problems) if problem not in problems]
    return Judged(
        problems=[part.problems[place] for place in kept],
        samples=[part.samples[place] for place in kept],
        correct=[part.correct[place] for place in kept],
        reward=None if part.reward is None else [part.reward[place] for place in kept],
    )
