"""How far the run is, for people: a live line on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

REWARD = "reward/mean"
TOKENS_PER_S = "throughput/tokens_per_s"
# Steps that the moving mean of the reward, and the estimate of the time left, look back on.
WINDOW = 20


class Progress:
    """Rank 0's display.

    The live display is a single line and never moves the cursor up, so what other processes write on the same
    terminal stays; what this process prints is set above it.
    """

    def __init__(
        self,
        total_steps: int,
        history: Sequence[Mapping[str, Any]] = (),
        stream: TextIO | None = None,
    ) -> None:
        """`history`: the steps before a resumed run goes on, as `MetricsLog.history` has them."""
        self._stream = stream or sys.stdout
        self._total = total_steps
        self._step, self._done = 0, 0
        self._phase, self._phase_began = "", time.monotonic()
        self._began = self._step_ended = time.monotonic()
        self._rewards: deque[float] = deque(maxlen=WINDOW)
        self._durations: deque[float] = deque(maxlen=WINDOW)
        self._first_reward: float | None = None
        self._tokens_per_s: float | None = None
        for metrics in history:
            self._take(metrics)
        if history:
            self._step = self._done = history[-1]["step"]
            self._began -= history[-1]["time_s"]
        self._live = self._open_live() if _is_terminal(self._stream) else None

    def show_phase(self, step: int, phase: str) -> None:
        """The run is in `phase` of `step`."""
        self._step, self._phase, self._phase_began = step, phase, time.monotonic()
        if self._live:
            self._live.refresh()

    def finish_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` is done; shows `reward/mean` and `throughput/tokens_per_s` of its metrics."""
        now = time.monotonic()
        self._durations.append(now - self._step_ended)
        self._step, self._done, self._phase, self._step_ended = step, step, "", now
        self._take(metrics)
        if self._live:
            self._live.refresh()
        else:
            print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """What is known now, on one line."""
        now = time.monotonic()
        parts = [f"step {self._step}/{self._total}"]
        if self._phase:
            parts.append(f"{self._phase} {now - self._phase_began:.0f} s")
        if self._rewards:
            mean = sum(self._rewards) / len(self._rewards)
            before = f"start {self._first_reward:.3f}, last {len(self._rewards)}: {mean:.3f}"
            parts.append(f"reward {self._rewards[-1]:.3f} ({before})")
        if self._tokens_per_s is not None:
            parts.append(f"{self._tokens_per_s:,.0f} tok/s")
        parts.append(f"elapsed {_clock(now - self._began)}")
        if self._durations:
            mean_duration = sum(self._durations) / len(self._durations)
            left = mean_duration * (self._total - self._done) - (now - self._step_ended)
            parts.append(f"left {_clock(max(left, 0.0))}")
        return " · ".join(parts)

    def close(self) -> None:
        """Ends the live display; its last state stays on the terminal."""
        if self._live:
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, metrics: Mapping[str, Any]) -> None:
        reward, tokens_per_s = metrics.get(REWARD), metrics.get(TOKENS_PER_S)
        if reward is not None and math.isfinite(reward):
            self._rewards.append(reward)
            self._first_reward = reward if self._first_reward is None else self._first_reward
        if tokens_per_s is not None and math.isfinite(tokens_per_s):
            self._tokens_per_s = tokens_per_s

    def _open_live(self) -> Live:
        live = Live(
            get_renderable=lambda: Text(self.line(), no_wrap=True, overflow="ellipsis"),
            console=Console(file=self._stream, force_terminal=True),
            refresh_per_second=2,
            # What goes to a file (`2>errors.log`) must not turn up on the terminal.
            redirect_stdout=sys.stdout is self._stream,
            redirect_stderr=sys.stderr.isatty(),
        )
        live.start()
        live.console.show_cursor(True)  # A killed run could not bring it back.
        return live


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def _clock(seconds: float) -> str:
    """`0:12:01`, `2 days, 3:00:00`."""
    return str(timedelta(seconds=round(seconds)))
