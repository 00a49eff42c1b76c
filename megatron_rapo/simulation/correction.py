"""What a real run took beside what its own configuration is simulated to take."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rapo.config import load_config
from megatron_rapo.errors import RapoError
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.observe.step_lines import read_step_lines
from megatron_rapo.planning.configured import as_configured, engines_of
from megatron_rapo.planning.plan import Planner
from megatron_rapo.planning.profile import Profile
from megatron_rapo.planning.workload import workload_of
from megatron_rapo.samples.store import steps_of
from megatron_rapo.simulation.conditions import Conditions
from megatron_rapo.simulation.lengths import exponential, read_lengths
from megatron_rapo.simulation.run import simulate
from megatron_rapo.simulation.seconds import Corrected, Correction, Seconds
from megatron_rapo.timeline.simulated import refuse_simulated

WARM_UP = 2  # steps that do not count
_STEPS = 12  # that are simulated
_BESIDE = ("rollout", "reward", "annotate", "update", "publish", "evaluate", "checkpoint")


def corrected_by(directory: Path, profile: Profile) -> Correction:
    """From the medians of a run's steps after the first two, by phase.

    Raises:
        RapoError: the run has too few steps, was simulated, or sampled ahead: how long its engines took is
            then not apart from how long they waited.
    """
    refuse_simulated(directory, "name a run that ran")
    steps = _steps(directory)
    config = load_config([directory / "config.toml"])
    if config.rollout.max_staleness:
        raise RapoError(
            f"--corrected-by {directory} sampled ahead (rollout.max_staleness = "
            f"{config.rollout.max_staleness}); name a run whose engines and trainer waited for each other"
        )
    if config.model.dtype != profile.dtype:
        raise RapoError(
            f'--corrected-by {directory} has model.dtype = "{config.model.dtype}", and the profile of '
            f"{profile.device} rates of {profile.dtype}; name a run of that type"
        )
    found = _simulated(directory, profile)

    def corrected(name: str) -> Corrected:
        taken, planned = _median(steps, name), _median(found, name)
        return Corrected(taken / planned) if planned else Corrected(more_s=taken)

    other = statistics.median(_beside(line) for line in steps)
    return Correction(
        engines=_median(steps, "sampling") / _median(found, "sampling"),
        annotate=corrected("annotate"),
        update=corrected("update"),
        publish=corrected("publish"),
        other_s=max(0.0, other - profile.step_s),
        source=str(directory),
    )


def _steps(directory: Path) -> list[dict[str, Any]]:
    lines = read_step_lines(directory / "metrics.jsonl")
    steps = [line for line in lines if line["step"] > WARM_UP and "time/sampling_s" in line]
    if not steps:
        raise RapoError(
            f"--corrected-by {directory} has no step after the first {WARM_UP} that sampled; name a longer "
            "run"
        )
    return steps


def _simulated(directory: Path, profile: Profile) -> Sequence[Mapping[str, Any]]:
    """The steps of the run's own configuration, simulated with its own lengths."""
    config = load_config([directory / "config.toml"], [f"run.steps={_STEPS}", "checkpoint.every=@default"])
    steps = _steps(directory)
    mean = statistics.fmean(line["rollout/response_tokens_mean"] for line in steps)
    planner = Planner(
        config,
        read_architecture(config.model.config or config.model.path),
        workload_of(config, None, mean),
        profile,
    )
    split = engines_of(config)
    engines = split.engines * split.tensor_parallel
    ranks = config.parallel.world_size
    devices = max(ranks, engines) if config.rollout.colocated else ranks + engines
    lengths = read_lengths(directory) if steps_of(directory) else exponential(planner.workload)
    seconds = Seconds(planner, as_configured(planner, devices))
    with tempfile.TemporaryDirectory() as scratch:
        simulate(config, seconds, lengths, Conditions(), Path(scratch))
        return _steps(Path(scratch))


def _beside(line: Mapping[str, Any]) -> float:
    known = sum(line.get(f"time/{name}_s", 0.0) for name in _BESIDE)
    return max(0.0, float(line["time/step_s"]) - known)


def _median(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.median(line[f"time/{name}_s"] for line in steps)
