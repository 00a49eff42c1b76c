"""Runs the episodes of many prompts: sampled by engines, judged while others are sampled."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, starmap
from types import TracebackType
from typing import Any, Self, TypeVar

from megatron_rapo.background import BackgroundLoop, all_of
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.bundle import Bundle, Window
from megatron_rapo.environments.generating import Turns
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.environments.running import Attempt, Common, EpisodeRunner, Judge, Tries
from megatron_rapo.environments.times import Times
from megatron_rapo.episode.environment import close
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.episode.outcome import Verification
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.dispatch import TooFewEngines
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling

T = TypeVar("T")

Play = Callable[[Attempt], Awaitable[Episode | Verification]]

_BEAT_S = 0.1  # between two looks at whether environments let others run
_GRACE_S = 1.0  # for a machine that is busy


@dataclass(frozen=True)
class Episodes:
    """What is to be run.

    Attributes:
        prompts: of each, a group.
        tries: of each prompt, its episodes.
        sampling: of all.
        judge: the configured reward.
        answers: where what code outside answers is kept; None: nowhere.
        so_far: of each prompt and episode, what is sampled already, to which more is added; None: nothing.
    """

    prompts: Sequence[Prompt]
    tries: Sequence[Tries]
    sampling: Sampling
    judge: Judge
    answers: Answers | None = None
    so_far: Sequence[Sequence[Turns]] | None = None

    @property
    def counts(self) -> list[int]:
        """Of each prompt."""
        return [len(one.guides) for one in self.tries]


class Rollout:
    """Episodes under way.

    Attributes:
        times: of those that have ended.
        numbers: of its episodes in each bundle.
    """

    def __init__(
        self,
        runner: Runner,
        sampled: Future[None],
        groups: Future[list[Group | None]],
        times: Times,
        numbers: Sequence[range],
    ) -> None:
        self.times = times
        self.numbers = numbers
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

    def check(self) -> None:
        """Raises what it has failed with so far."""
        if self._groups.done():
            self._groups.result()

    def give_up(self) -> None:
        """Ends what is under way."""
        self._groups.cancel()


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
        times, bundles = Times(), self.bundles(len(prompts))
        with ExitStack() as stack:
            window = Window(stack.enter_context(self._pool.round()), sampling, times)
            rollout = self.start(Episodes(prompts, tries, sampling, judge, answers), bundles, times)
            stack.callback(rollout.give_up)
            for bundle in bundles:
                self.call(partial(bundle.open, window))
            yield rollout

    def bundles(self, prompts: int, *, goes_on: bool = False) -> list[Bundle]:
        """Of so many prompts: one for those that share requests."""
        size = self._pool.requests(prompts)
        return [Bundle(gather_all=self._gather_all, goes_on=goes_on) for _ in range(0, prompts, size)]

    def start(self, episodes: Episodes, bundles: Sequence[Bundle], times: Times) -> Rollout:
        """Begins episodes, whose turns are sampled once their bundles are opened; none of these may be open.

        Args:
            episodes: to be run.
            bundles: `bundles` of as many prompts.
            times: counts the episodes.
        """
        size, counts = self._pool.requests(len(episodes.prompts)), episodes.counts
        parts = [range(len(counts))[start : start + size] for start in range(0, len(counts), size)]
        numbers = [
            bundle.admit(sum(counts[place] for place in part))
            for bundle, part in zip(bundles, parts, strict=True)
        ]
        sampled: Future[None] = Future()
        sampling_still = sum(counts)
        began = time.monotonic()

        def end() -> None:
            times.sampling_s = time.monotonic() - began
            sampled.set_result(None)

        def ended() -> None:
            nonlocal sampling_still
            sampling_still -= 1
            if not sampling_still:
                end()

        async def part(bundle: Bundle, places: range, first: int) -> list[Group | None]:
            firsts = accumulate((counts[place] for place in places), initial=first)
            common = Common(bundle, episodes.sampling, times, episodes.answers)
            play = partial(self._episodes.play, common=common)
            return await all_of(
                self._group(episodes, place, first, play, ended)
                for place, first in zip(places, firsts, strict=False)
            )

        async def every() -> list[Group | None]:
            each = zip(bundles, parts, numbers, strict=True)
            try:
                found = await all_of(part(bundle, places, own.start) for bundle, places, own in each)
                return [group for groups in found for group in groups]
            finally:
                if not sampled.done():  # there was nothing to sample, or some was given up
                    end()

        return Rollout(self, sampled, self._loop.start(every()), times, numbers)

    def call(self, function: Callable[[], object]) -> None:
        """Has the environments' loop call a plain function, after what it was given before."""
        self._loop.call(function)

    def wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work in the environments' loop.

        Raises:
            RapoError: as `wait`.
        """
        future = self._loop.start(work)
        self.wait(future)
        return future.result()

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
        self, episodes: Episodes, place: int, first: int, play: Play, ended: Callable[[], None]
    ) -> Group | None:
        """Of the prompt at `place`, whose first episode has this number in the bundle."""
        prompt, tries = episodes.prompts[place], episodes.tries[place]

        async def episode(number: int, guide: Guide) -> Any:
            so_far = None if episodes.so_far is None else episodes.so_far[place][number]
            attempt = Attempt(prompt, tries.first + number, first + number, guide, tries.before, so_far)
            try:
                found = await play(attempt)
            finally:
                ended()
            return await self._episodes.judge(found, prompt.problem, episodes.judge)

        try:
            return Group(prompt.problem, tuple(await all_of(starmap(episode, enumerate(tries.guides)))))
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
