"""What one rank tells of its run: its phases on every rank, metrics and progress on rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

from megatron_rapo.config import RunConfig
from megatron_rapo.observe.heartbeat import Heartbeat
from megatron_rapo.observe.metrics import MetricsLog
from megatron_rapo.observe.phases import Listener, Phases
from megatron_rapo.observe.profile import Profiler
from megatron_rapo.observe.progress import Progress
from megatron_rapo.timeline.record import Timeline


class Observer:
    """Phases are known from the first moment; the logs open once it is known where the run goes on.

    Attributes:
        timeline: when this rank was in which phase, and what it asked engines.
    """

    def __init__(self, config: RunConfig, rank: int, world_size: int) -> None:
        self._config = config
        self._rank = rank
        self.timeline = Timeline(config.run.directory, rank)
        self._profiler = Profiler(config, rank)
        beat = Heartbeat(config.run.directory, rank, world_size).beat
        self._phases = Phases([beat, self.timeline.enter])
        self._logs = ExitStack()
        self._metrics: MetricsLog | None = None
        self._progress: Progress | None = None
        self._phases.listen(self._show_phase)

    def open_logs(self, resume_step: int | None) -> None:
        """Opens the logs of a new run (None), or of one that goes on after `resume_step`; also of one that is
        rolled back.

        Raises:
            RapoError: metrics.jsonl is damaged, or wandb is asked for and not there.
        """
        if self._rank != 0:
            return
        self._logs.close()
        self._metrics = self._logs.enter_context(MetricsLog(self._config, resume_step))
        self._progress = self._logs.enter_context(Progress(self._config.run.steps, self._metrics.history))

    def listen(self, listener: Listener) -> None:
        """Tells one more listener of each change of phase from now on."""
        self._phases.listen(listener)

    def begin_step(self, step: int) -> None:
        """`step` begins; 0 is what comes before the first."""
        self._profiler.begin_step(step)
        self._phases.begin_step(step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the step, such as `rollout`: timed, shown, and in the heartbeat."""
        with self._phases.phase(name), self._profiler.phase(name):
            yield

    def times(self) -> dict[str, float]:
        """Seconds of the step so far: `time/<phase>_s`, and `time/step_s`."""
        return self._phases.times()

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        """Ends the step: rank 0 logs its `metrics` and phase times; other ranks' are not used."""
        self.timeline.flush()
        self._profiler.finish_step()
        if self._metrics is None or self._progress is None:
            return
        self._metrics.write(self._phases.step, {**metrics, **self._phases.times()})
        self._progress.finish_step(self._phases.step, metrics)

    def _show_phase(self, step: int, phase: str) -> None:
        if self._progress is not None:
            self._progress.show_phase(step, phase)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.timeline.flush()
        self._logs.__exit__(kind, error, trace)
