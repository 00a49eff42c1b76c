"""A configuration's own layout, predicted like those that a plan tries."""

from __future__ import annotations

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.planning.engine_cost import EngineSplit
from megatron_rapo.planning.layouts import Division, TrainerLayout
from megatron_rapo.planning.plan import Planned, Planner


def engines_of(config: RunConfig) -> EngineSplit:
    """The engines that a configuration names or starts."""
    if config.slurm is not None:
        return EngineSplit(config.slurm.engines, config.slurm.gpus_per_engine)
    return EngineSplit(config.rollout.engine.count, config.rollout.engine.ranks)


def as_configured(planner: Planner, devices: int) -> Planned:
    """How the run goes as it is configured, on so many devices.

    Raises:
        RapoError: it takes another number of devices, or its engines have no room.
    """
    config, split = planner.config, engines_of(planner.config)
    trainer, engines = config.parallel.world_size, split.engines * split.tensor_parallel
    colocated = config.rollout.colocated
    needed = max(trainer, engines) if colocated else trainer + engines
    if needed != devices:
        raise RapoError(
            f"--gpus {devices}: as configured, the run has {trainer} trainer ranks and {split.engines} "
            f"engines of {split.tensor_parallel} devices{', colocated' if colocated else ''}; give --gpus "
            f"{needed}, or leave --as-configured out"
        )
    layout = TrainerLayout(
        config.parallel, config.algorithm.max_tokens_per_microbatch, config.model.recompute
    )
    division = Division(trainer, engines, colocated)
    return planner.predict(division, layout, split, config.rollout.max_staleness)
