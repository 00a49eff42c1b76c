"""Episodes that go on from one version of the weights to the next."""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from megatron_rapo.background import all_of
from megatron_rapo.environments.bundle import Window
from megatron_rapo.environments.generating import Turns
from megatron_rapo.environments.runner import Episodes, Rollout, Runner
from megatron_rapo.environments.times import Times
from megatron_rapo.episode.group import Group
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling


@dataclass(frozen=True)
class _Open:
    """A rollout that is not finished, and what is sampled of it."""

    rollout: Rollout
    so_far: Sequence[Sequence[Turns]]


class Windows:
    """Rollouts of as many prompts each, whose turns share requests: a head's own.

    A window samples with one version of the weights. At its end each episode has ended, or had as many tokens
    as it may have of that version.
    """

    def __init__(self, runner: Runner, pool: EnginePool, prompts: int) -> None:
        """
        Args:
            runner: of the episodes.
            pool: of the engines.
            prompts: of this head, in each rollout.
        """
        self._runner = runner
        self._pool = pool
        self._bundles = runner.bundles(prompts, goes_on=True)
        self._open: dict[int, _Open] = {}
        self._round = ExitStack()
        self._times = Times()
        self._began = 0.0

    def begin(self, number: int, episodes: Episodes) -> None:
        """Begins a rollout, which the next window samples; `so_far` of the episodes is given."""
        assert episodes.so_far is not None
        rollout = self._runner.start(episodes, self._bundles, Times())
        self._open[number] = _Open(rollout, episodes.so_far)

    def open(self, sampling: Sampling, tokens: int, whole: Container[int]) -> None:
        """Begins a window.

        Args:
            sampling: of it; `weight_version` is the engines'.
            tokens: most of an episode.
            whole: numbers of rollouts that it samples to their end.
        """
        self._times, self._began = Times(), time.monotonic()
        limits: list[dict[int, int]] = [{} for _ in self._bundles]
        for number, one in self._open.items():
            for own, episodes in zip(limits, one.rollout.numbers, strict=True):
                own.update(dict.fromkeys(() if number in whole else episodes, tokens))
        self._sample(sampling, limits)

    def go_on(self, sampling: Sampling) -> None:
        """Goes on with a window that lost too many engines, with what it had left, and these weights."""
        self._sample(sampling, [None] * len(self._bundles))

    def _sample(self, sampling: Sampling, limits: Sequence[dict[int, int] | None]) -> None:
        window = Window(self._round.enter_context(self._pool.round()), sampling, self._times)
        for bundle, own in zip(self._bundles, limits, strict=True):
            self._runner.call(partial(bundle.open, window, own))

    def wait(self) -> bool:
        """Waits for the window's end; whether it lost too many engines before.

        Raises:
            RapoError: an engine refused, or environment or reward are at fault.
        """
        with self._round.pop_all():
            lost = self._runner.wait_for(all_of(bundle.until_at_rest() for bundle in self._bundles))
        self._times.sampling_s = self._times.open.seconds = time.monotonic() - self._began
        for one in self._open.values():
            one.rollout.check()
        return any(lost)

    def finish(self, number: int) -> tuple[list[Group], Times]:
        """The groups of a rollout that was sampled to its end, once they are judged; and times, of its
        episodes and of the newest window.

        Raises:
            RapoError: as `wait`.
        """
        rollout = self._open.pop(number).rollout
        groups = [group for group in rollout.groups() if group is not None]
        own = rollout.times
        window = self._times
        times = Times(own.episodes, own.engine_s, own.own_s, window.sampling_s, window.open, window.asking)
        return groups, times

    def so_far(self, number: int) -> list[list[Turns]]:
        """What is sampled of a rollout at a window's end: a copy, of its prompts and their episodes."""
        return [[_copied(turns) for turns in group] for group in self._open[number].so_far]

    def close(self) -> None:
        """Gives up all that is under way."""
        self._round.close()
        for one in self._open.values():
            one.rollout.give_up()


def _copied(turns: Turns) -> Turns:
    return {number: pieces.copy() for number, pieces in turns.items()}
