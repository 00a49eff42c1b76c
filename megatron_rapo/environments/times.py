"""Where the time of a rollout goes: to engines, to the environments' own code, or to engines that wait."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_rapo.environments.own_time import OwnTime


class Busy:
    """Seconds in which at least one of several things was under way. Of one thread.

    Attributes:
        seconds: up to when there was nothing last.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._under_way = 0
        self._since = 0.0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """One of them is under way until this is left."""
        if not self._under_way:
            self._since = time.monotonic()
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self.seconds += time.monotonic() - self._since


@dataclass
class Times:
    """Of the episodes of a head, seconds.

    Attributes:
        episodes: that ended.
        engine_s: that they waited for their turns, all together.
        own_s: that they took for themselves: tools, functions that speak, the environment.
        sampling_s: from their beginning until engines were asked nothing more.
        open: while any episode was under way.
        asking: while any request to an engine was.
    """

    episodes: int = 0
    engine_s: float = 0.0
    own_s: float = 0.0
    sampling_s: float = 0.0
    open: Busy = field(default_factory=Busy)
    asking: Busy = field(default_factory=Busy)

    def add(self, one: OwnTime) -> None:
        """Counts an episode that ended."""
        self.episodes += 1
        self.engine_s += one.engine_s
        self.own_s += one.own_s

    def extend(self, other: Times) -> None:
        """Counts another rollout, which ended."""
        self.episodes += other.episodes
        self.engine_s += other.engine_s
        self.own_s += other.own_s
        self.sampling_s += other.sampling_s
        self.open.seconds += other.open.seconds
        self.asking.seconds += other.asking.seconds

    def metrics(self) -> Mapping[str, float]:
        """Of sampling, means of an episode, and how idle engines were; nothing where no episode was run."""
        if not self.episodes or not self.open.seconds:
            return {}
        return {
            "time/sampling_s": self.sampling_s,
            "time/episode/engine_s": self.engine_s / self.episodes,
            "time/episode/own_s": self.own_s / self.episodes,
            "time/engines_idle": max(0.0, 1.0 - self.asking.seconds / self.open.seconds),
        }
