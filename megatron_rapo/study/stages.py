"""The two stages of a study, as far as results let them be planned: the search, and the study itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.study.added_seeds import read_looks, seeds_of
from megatron_rapo.study.arms import PlannedArm, expand
from megatron_rapo.study.attempts import read_attempts
from megatron_rapo.study.following import leave_metrics
from megatron_rapo.study.plan import PlannedRun, main_runs, tuning_runs
from megatron_rapo.study.results import FOLDER, Result, read_planned
from megatron_rapo.study.schema import Study
from megatron_rapo.study.tuning import Search, searches, trials_of


@dataclass(frozen=True)
class Stages:
    """What is to be run, and what is there.

    Attributes:
        arms: of the study.
        tuning: the search's runs.
        main: the study's; before the search is through, with the tuned options as the files have them.
        searched: whether the search is through, so that `main` is as it will be run.
        searches: by arm.
        results: of finished runs, by name.
        strangers: results that are of no run of this study.
        later: arms and seeds that follow runs without a result; what they will be is not known yet.
    """

    arms: Sequence[PlannedArm]
    tuning: Sequence[PlannedRun]
    main: Sequence[PlannedRun]
    searched: bool
    searches: Mapping[str, Search]
    results: Mapping[str, Result]
    strangers: Sequence[str]
    later: Sequence[tuple[PlannedArm, int]]
    retries: int

    @property
    def runs(self) -> list[PlannedRun]:
        """Of both stages."""
        return [*self.tuning, *self.main]

    def why_missing(self, run: PlannedRun, folder: Path) -> str:
        """Why a run has no result."""
        failures = [attempt for attempt in read_attempts(folder, run.name) if attempt.failed]
        if len(failures) > self.retries:
            return f"failed {len(failures)} times: {failures[-1].told.splitlines()[-1]}"
        return "not finished"


def plan_stages(study: Study, folder: Path) -> Stages:
    """Plans all runs.

    Raises:
        RapoError: a configuration is not valid, or a result is damaged or of another configuration.
    """
    arms = expand(study)
    trials = trials_of(study, arms)
    tuning = tuning_runs(study, arms, trials, folder)
    tuned_results = read_planned(folder, tuning)
    through = all(run.name in tuned_results or _failed_for_good(folder, run, study.retries) for run in tuning)
    found = searches(study, arms, trials, list(tuned_results.values()), complete=through)
    chosen = {name: search.chosen.options for name, search in found.items() if search.chosen is not None}
    seeds = seeds_of(study.seeds, read_looks(folder))
    pairs = [
        (arm, seed) for place, seed in enumerate(seeds) for arm in arms if place < (arm.seeds or len(seeds))
    ]
    main = main_runs(study, [pair for pair in pairs if pair[0].follows is None], folder, chosen)
    results = {**tuned_results, **(read_planned(folder, main) if through else {})}
    done = {(result.arm, result.seed): result for result in results.values() if result.stage == "main"}
    following = [(arm, seed) for arm, seed in pairs if arm.follows is not None]
    ready = [(arm, seed) for arm, seed in following if (arm.follows, seed) in done]
    for arm, seed in ready:
        leave_metrics(folder, done[str(arm.follows), seed])
    followers = main_runs(study, ready, folder, chosen)
    main, results = [*main, *followers], {**results, **read_planned(folder, followers)}
    later = [pair for pair in following if pair not in ready]
    names = {run.name for run in [*tuning, *main]}
    strangers = [file.stem for file in sorted((folder / FOLDER).glob("*.json")) if file.stem not in names]
    return Stages(arms, tuning, main, through, found, results, strangers, later, study.retries)


def _failed_for_good(folder: Path, run: PlannedRun, retries: int) -> bool:
    return sum(attempt.failed for attempt in read_attempts(folder, run.name)) > retries
