"""What must fit the number of optimizer updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_rapo.config.schema import RunConfig


def check_schedule(config: RunConfig) -> None:
    """Refuses a warm-up that does not end, and a decay that ends too early.

    Raises:
        ValueError: it does not fit.
    """
    warmup, updates = config.optimizer.warmup_updates, config.run.steps * config.updates_per_step
    if warmup >= updates:
        raise ValueError(
            f"optimizer.warmup_updates = {warmup} leaves none of the run's {updates} updates at the full "
            "rate; lower it, or raise run.steps"
        )
    decay = config.decay_steps
    if decay < config.run.steps and config.optimizer.min_learning_rate == 0:
        raise ValueError(
            f"optimizer.decay_steps = {decay} is below run.steps = {config.run.steps}, whose last steps "
            "would learn nothing at min_learning_rate = 0; set that, or raise decay_steps"
        )
    if warmup >= decay * config.updates_per_step:
        raise ValueError(
            f"optimizer.warmup_updates = {warmup} does not end before optimizer.decay_steps = {decay} "
            f"({decay * config.updates_per_step} updates); lower it, or raise decay_steps"
        )
