"""The log of a run's metrics: one value a name and step, in a file, TensorBoard and Weights & Biases."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from numbers import Real
from types import TracebackType
from typing import Any, Self

from megatron_rapo.config import RunConfig
from megatron_rapo.observe.loggers import Logger, TensorBoard, WeightsAndBiases
from megatron_rapo.observe.step_lines import StepLines

NON_FINITE = "log/non_finite"

# reward/mean, evaluate/pass@16; behind the group data sets and users' own numbers have names of their own
_NAME = re.compile(r"[a-z0-9_]+(/[^/]+)+")


class MetricsLog:
    """Writes metrics of each step to `<run>/metrics.jsonl`, TensorBoard and, where configured, wandb.

    A value that is not finite (the mean of nothing) is `null` in the file and left out elsewhere;
    the metric `log/non_finite` counts those of the step, so that none goes unseen.
    """

    def __init__(self, config: RunConfig, resume_step: int | None = None) -> None:
        """Opens the logs of a new run (None), or of one that goes on after `resume_step`.

        Raises:
            RapoError: metrics.jsonl is damaged, or wandb is asked for and not there.
        """
        config.run.directory.mkdir(parents=True, exist_ok=True)
        self._lines = StepLines(config.run.directory / "metrics.jsonl", resume_step)
        self._loggers: list[Logger] = [TensorBoard(config, resume_step)]
        if config.observe.wandb != "off":
            self._loggers.append(WeightsAndBiases(config, resume_step))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The steps that stood in metrics.jsonl when it was opened, oldest first."""
        return self._lines.history

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs all metrics of a step, once.

        Raises:
            ValueError: a name is not like `reward/mean`, or the step is not after the last one.
            TypeError: a value is no number.
        """
        values = {name: _number(name, value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        count = {NON_FINITE: len(values) - len(finite)}
        self._lines.write(step, {**{name: finite.get(name) for name in values}, **count})
        for logger in self._loggers:
            logger.write(step, {**finite, **count})

    def close(self, failed: bool = False) -> None:
        """Closes all logs; `failed` tells that an error ended the run."""
        with ExitStack() as each:  # also those after one whose disk is full
            for logger in self._loggers:
                each.callback(logger.close, failed)
            each.callback(self._lines.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def _number(name: str, value: object) -> int | float:
    if not _NAME.fullmatch(name) or name == NON_FINITE:
        raise ValueError(
            f"metric name {name!r} is not like reward/mean: a group in lower case, then names; rename it"
        )
    if not isinstance(value, Real):
        raise TypeError(f"metric {name} is a {type(value).__name__}, not a number; log .item() of tensors")
    return int(value) if isinstance(value, int) else float(value)
