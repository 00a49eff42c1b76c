"""The evaluations in a training run's directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.evaluation.manifest import FILE, Manifest


@dataclass(frozen=True)
class EvaluationsOfRun:
    """Directories of evaluations, by the steps that they are of.

    Attributes:
        finished: those with every sample.
        unfinished: those that a run is at, or was stopped at.
    """

    finished: tuple[Path, ...]
    unfinished: tuple[Path, ...]


def evaluations_of(run: Path) -> EvaluationsOfRun:
    """The evaluations of a run; none where it is no run, or has not begun one.

    Raises:
        RapoError: a manifest cannot be read.
    """
    manifests = {file.parent: Manifest.read(file.parent) for file in run.glob(f"evaluations/*/{FILE}")}
    in_order = sorted(manifests, key=lambda path: (manifests[path].model.step or 0, path.name))
    return EvaluationsOfRun(
        tuple(path for path in in_order if manifests[path].finished is not None),
        tuple(path for path in in_order if manifests[path].finished is None),
    )
