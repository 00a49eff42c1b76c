"""Which learning rate an update has."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rapo.config import Optimizer


class LearningRate:
    """The rate of each update, as Megatron's schedule has it at a place on its curve.

    Of N updates, W of them warm-up, update n (from 1) has

        learning_rate · n / W                                        while n ≤ W,
        min + (learning_rate − min) · s(p), p = (n − 1 − W) / (N − W)      then,

    with s(p) = 1 − p (linear), (1 + cos πp) / 2 (cosine) or 1 (constant). So neither the first update nor the
    last has a rate of 0: the curve's ends, where it may be 0, lie before the one and behind the other.
    """

    def __init__(self, megatron_optimizer: Any, optimizer: Optimizer, total_updates: int) -> None:
        """`total_updates` is N; updates beyond it have `optimizer.min_learning_rate`."""
        self._warmup = optimizer.warmup_updates
        self._done = 0
        self._schedule = OptimizerParamScheduler(
            megatron_optimizer,
            init_lr=0.0,
            max_lr=optimizer.learning_rate,
            min_lr=optimizer.min_learning_rate,
            lr_warmup_steps=optimizer.warmup_updates,
            lr_decay_steps=total_updates,
            lr_decay_style=optimizer.decay,
            start_wd=optimizer.weight_decay,
            end_wd=optimizer.weight_decay,
            wd_incr_steps=total_updates,
            wd_incr_style="constant",
        )

    def go_to(self, done: int) -> None:
        """`done` updates have been made."""
        self._done = done

    def begin_update(self) -> None:
        """Gives the optimizer the rate of the next update, which counts as made."""
        self._done += 1
        self._schedule.num_steps = self._done if self._done <= self._warmup else self._done - 1
        self._schedule.step(increment=0)
