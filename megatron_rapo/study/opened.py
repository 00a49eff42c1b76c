"""A study on disk: its file, and the folder of the same name beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.study.plan import PlannedRun
from megatron_rapo.study.schema import Study, load_study
from megatron_rapo.study.stages import Stages, plan_stages
from megatron_rapo.study.standing import Standing, State, standings


@dataclass(frozen=True)
class Opened:
    """A study.

    Attributes:
        file: the study's.
        folder: `runs/`, `results/`, `report/`, and what was tried and logged.
    """

    file: Path
    folder: Path
    study: Study

    @classmethod
    def at(cls, file: Path) -> Opened:
        """Reads it.

        Raises:
            RapoError: the file is not valid.
        """
        return cls(file, file.with_suffix(""), load_study(file))

    def plan(self) -> Stages:
        """Its runs, as results let them be planned.

        Raises:
            RapoError: a configuration is not valid, or a result damaged or of another configuration.
        """
        return plan_stages(self.study, self.folder)

    def standings(self, stages: Stages) -> list[Standing]:
        """Where all runs stand. Those whose options the search is still to choose wait.

        Raises:
            RapoError: a run's folder is of another configuration.
        """
        found = standings(self.folder, self.ready(stages), stages.results, self.study.retries)
        return [*found, *([] if stages.searched else [Standing(run, State.WAITING) for run in stages.main])]

    def ready(self, stages: Stages) -> list[PlannedRun]:
        """Runs whose options are known."""
        return stages.runs if stages.searched else list(stages.tuning)

    def todo(self, stages: Stages) -> list[PlannedRun]:
        """Those that can be made now; what other commands make already is left to them."""
        kept = (State.WAITING, State.BEGUN)
        found = standings(self.folder, self.ready(stages), stages.results, self.study.retries)
        return [one.run for one in found if one.state in kept]
