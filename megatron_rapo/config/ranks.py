"""What must fit the number of ranks, and of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rapo.config.schema import RunConfig


def check_ranks(config: RunConfig) -> None:
    """Refuses a job of another number of ranks than the layout has, and profiles of ranks or steps beyond it.

    Raises:
        ValueError: it does not fit.
    """
    slurm, layout, observe = config.slurm, config.parallel, config.observe
    if slurm is not None and slurm.ranks != layout.world_size:
        raise ValueError(
            f"slurm.trainer_nodes = {slurm.trainer_nodes} × slurm.ranks_per_node = "
            f"{slurm.ranks_per_node} are {slurm.ranks} ranks, but [parallel] lays out "
            f"{layout.world_size} (TP × PP × CP × DP); make them equal"
        )
    if observe.profile_steps and max(observe.profile_ranks, default=0) >= layout.world_size:
        raise ValueError(
            f"observe.profile_ranks = {observe.profile_ranks} names a rank beyond those of [parallel], 0 to "
            f"{layout.world_size - 1}; lower it"
        )
    if max(observe.profile_steps, default=0) > config.run.steps:
        raise ValueError(
            f"observe.profile_steps = {observe.profile_steps} has a step beyond run.steps = "
            f"{config.run.steps}; lower it"
        )
