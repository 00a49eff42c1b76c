"""The search that each arm gets alike: which settings it tries, and which one it takes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_rapo.config.write import toml_value
from megatron_rapo.errors import RapoError
from megatron_rapo.study.arms import PlannedArm
from megatron_rapo.study.outcomes import mean_outcome
from megatron_rapo.study.results import Result
from megatron_rapo.study.schema import Options, Outcome, Study


@dataclass(frozen=True)
class Trial:
    """A setting and what it came to.

    Attributes:
        options: the tuned ones.
        outcomes: of each of the search's seeds that is done.
    """

    options: Options
    outcomes: Sequence[float]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return sum(self.outcomes) / len(self.outcomes)


@dataclass(frozen=True)
class Search:
    """An arm's search.

    Attributes:
        tried: those with an outcome of every seed.
        chosen: the best of them; None until all are done, or have failed for good.
        at_edge: tuned options whose chosen value is the first or the last of its candidates.
    """

    tried: Sequence[Trial]
    chosen: Trial | None
    at_edge: Sequence[str]


def trials_of(study: Study, arms: Sequence[PlannedArm]) -> dict[str, list[Options]]:
    """The settings that each arm tries: its grid, or as many of it as all arms try, drawn by the arm's name.

    Raises:
        RapoError: an arm's grid has fewer than all are to try: it would get a smaller search.
    """
    if study.tuning is None:
        return {}
    number, trials = study.tuning.trials, {}
    for arm in arms:
        if not arm.train or arm.follows:
            continue
        grid = [dict(zip(arm.tune, values, strict=True)) for values in product(*arm.tune.values())]
        if len(grid) < number:
            raise RapoError(
                f"arm {toml_value(arm.name)} has {len(grid)} settings to try, and tuning.trials = {number}: "
                "it would get a smaller search than others; give it more candidates, or lower tuning.trials"
            )
        kept = sorted(random.Random(f"trials of {arm.name}").sample(range(len(grid)), number))
        trials[arm.name] = [grid[place] for place in kept]
    return trials


def searches(
    study: Study,
    arms: Sequence[PlannedArm],
    trials: Mapping[str, Sequence[Options]],
    results: Sequence[Result],
    *,
    complete: bool,
) -> dict[str, Search]:
    """What came of each arm's search.

    Args:
        trials: of each arm.
        results: of the search's runs.
        complete: whether no more will come.

    Raises:
        RapoError: no setting of an arm came to its end.
    """
    if study.tuning is None:
        return {}
    outcome = Outcome.read(study.tuning.outcome or study.outcome)
    found = {}
    for arm in arms:
        tried = []
        for number, options in enumerate(trials.get(arm.name, ())):
            mine = [one for one in results if one.arm == arm.name and one.trial == number]
            if len(mine) == len(study.tuning.seeds):
                tried.append(Trial(options, [mean_outcome(one, outcome) for one in mine]))
        if arm.name not in trials:
            continue
        if complete and not tried:
            raise RapoError(
                f"no setting of arm {toml_value(arm.name)} came through the search; see the failed runs "
                "(--status), mend them, and start them again with --retry-failed"
            )
        best = max(tried, key=lambda trial: trial.mean) if complete else None
        found[arm.name] = Search(tried, best, _at_edge(arm.tune, best))
    return found


def _at_edge(tune: Mapping[str, Sequence[Any]], chosen: Trial | None) -> list[str]:
    if chosen is None:
        return []
    return [
        option
        for option, values in tune.items()
        if len(values) > 1 and chosen.options[option] in (values[0], values[-1])
    ]
