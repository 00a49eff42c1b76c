"""Runs the episodes of many prompts: sampled by engines, judged while others are sampled."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from itertools import accumulate
from types import TracebackType
from typing import Any, Self

from megatron_rapo.background import BackgroundLoop, all_of
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.bundle import Bundle
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.environments.running import Attempt, Common, EpisodeRunner, Judge, Tries
from megatron_rapo.environments.times import Times
from megatron_rapo.episode.environment import close
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN
from megatron_rapo.episode.outcome import Verification
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.dispatch import TooFewEngines
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling

Play = Callable[[Attempt], Awaitable[Episode | Verification]]

_BEAT_S = 0.1  # between two looks at whether environments let others run
_GRACE_S = 1.0  # for a machine that is busy


class Rollout:
    """Episodes under way.

    Attributes:
        times: of those that have ended.
    """

    def __init__(
        self, runner: Runner, sampled: Future[None], groups: Future[list[Group | None]], times: Times
    ) -> None:
        self.times = times
        self._runner = runner
        self._sampled = sampled
        self._groups = groups

    def wait_until_sampled(self) -> None:
        """Waits until engines are asked nothing more; what failed is told by `groups`.

        Raises:
            RapoError: the environment blocks all episodes.
        """
        self._runner.wait(self._sampled)

    def groups(self) -> list[Group | None]:
        """Waits until all is judged: a group of each prompt, in order; None where too few engines were left.

        Raises:
            RapoError: an engine refused, or environment or reward are at fault.
        """
        self._runner.wait(self._groups)
        return self._groups.result()


class Runner:
    """Runs episodes on the engines of a pool; a context manager.

    Environments have an event loop of their own: one that blocks it is told, and harms no engine's watch.
    """

    def __init__(self, episodes: EpisodeRunner, pool: EnginePool) -> None:
        self._episodes = episodes
        self._pool = pool
        self._loop = BackgroundLoop("environments")
        self._beat = time.monotonic()
        self._blocked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._blocked:  # its thread, which ends with the process, would be waited for
            return
        limit = self._episodes.options.time_limit_s
        try:
            self._loop.run(asyncio.wait_for(close(self._episodes.environment), limit))
        finally:
            self._loop.close()

    @cached_property
    def _gather_all(self) -> bool:
        """Engines that come back are of the same kind."""
        return self._pool.one_request_at_a_time()

    @contextmanager
    def begin(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        judge: Judge,
        tries: Sequence[Tries] | None = None,
        answers: Answers | None = None,
    ) -> Iterator[Rollout]:
        """Begins the episodes of the prompts.

        What is not done when it is left is given up.

        Args:
            prompts: of each, a group.
            sampling: of all.
            judge: the configured reward.
            tries: of each prompt, its episodes; default: `sampling.responses_per_prompt` of its own.
            answers: where what code outside answers is kept; default: nowhere.
        """
        tries = tries or [Tries(0, (PLAIN,) * sampling.responses_per_prompt)] * len(prompts)
        asked = list(zip(prompts, tries, strict=True))
        size, gather_all = self._pool.requests(len(prompts)), self._gather_all
        sampled: Future[None] = Future()
        times = Times()
        sampling_still = sum(len(one.guides) for one in tries)  # episodes
        began = time.monotonic()

        def end() -> None:
            times.sampling_s = time.monotonic() - began
            sampled.set_result(None)

        def ended() -> None:
            nonlocal sampling_still
            sampling_still -= 1
            if not sampling_still:
                end()

        with ExitStack() as stack:
            round_ = stack.enter_context(self._pool.round())

            async def part(asked: Sequence[tuple[Prompt, Tries]]) -> list[Group | None]:
                firsts = [0, *accumulate(len(tries.guides) for _, tries in asked)]
                bundle = Bundle(round_, sampling, firsts[-1], gather_all=gather_all, times=times)
                play = partial(self._episodes.play, common=Common(bundle, sampling, times, answers))
                return await all_of(
                    self._group(prompt, tries, first, play, judge, ended)
                    for (prompt, tries), first in zip(asked, firsts, strict=False)
                )

            async def every() -> list[Group | None]:
                parts = [asked[start : start + size] for start in range(0, len(asked), size)]
                try:
                    return [group for groups in await all_of(map(part, parts)) for group in groups]
                finally:
                    if not sampled.done():  # there was nothing to sample, or some was given up
                        end()

            groups = self._loop.start(every())
            stack.callback(groups.cancel)
            yield Rollout(self, sampled, groups, times)

    def run(self, prompts: Sequence[Prompt], sampling: Sampling, judge: Judge) -> list[Group | None]:
        """The groups of the prompts (`Rollout.groups`)."""
        with self.begin(prompts, sampling, judge) as rollout:
            return rollout.groups()

    def wait(self, future: Future[Any]) -> None:
        """Waits for the future.

        Raises:
            RapoError: what it failed with; or the environment blocks all episodes.
        """
        self._beat = time.monotonic()
        while not future.done():
            self._loop.call(self._note)
            try:
                future.result(_BEAT_S)
            except TimeoutError:
                self._check_beat()
        future.result()

    async def _group(
        self, prompt: Prompt, tries: Tries, first: int, play: Play, judge: Judge, ended: Callable[[], None]
    ) -> Group | None:
        """`first` is the place of the prompt's first episode in the bundle."""

        async def episode(place: int) -> Any:
            attempt = Attempt(prompt, tries.first + place, first + place, tries.guides[place], tries.before)
            try:
                found = await play(attempt)
            finally:
                ended()
            return await self._episodes.judge(found, prompt.problem, judge)

        try:
            places = range(len(tries.guides))
            return Group(prompt.problem, tuple(await all_of(episode(place) for place in places)))
        except TooFewEngines:
            return None

    def _note(self) -> None:
        self._beat = time.monotonic()

    def _check_beat(self) -> None:
        options = self._episodes.options
        if time.monotonic() - self._beat <= options.time_limit_s + _GRACE_S:
            return
        self._blocked = True
        frame = sys._current_frames().get(self._loop.thread_id)
        where = "".join(traceback.format_stack(frame)[-3:]) if frame else ""
        raise RapoError(
            f'environment.use = "{options.use}" has blocked all episodes for more than '
            f"environment.time_limit_s = {options.time_limit_s:g} s; let it await what takes time "
            f"(asyncio.to_thread for plain functions). It is here:\n{where}"
        )
