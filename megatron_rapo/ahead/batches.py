"""A run's batches: each sampled by the weights that the schedule names, and taken by the step it is for.

With n = `rollout.max_staleness`, step t trains on what the weights of step max(0, t − 1 − n) sampled. A batch
is begun once those weights are published, and sampled to its end before the next ones are: engines work while
the trainer does, and a request never meets two versions. Which weights sample what follows from t alone, not
from how fast anything was, so a run repeats bit for bit, also one that was killed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from megatron_rapo.ahead.asking import sampling_of, seed_of
from megatron_rapo.ahead.unfinished import Unfinished
from megatron_rapo.config import RunConfig
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.experience.batch import Batch, Prompts, collect
from megatron_rapo.experience.course import Course, Phase, Sampled, Wanted, follow
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.sampling import Sampling


class Source(Protocol):
    """Where groups come from: engines (`Collector`), a recorded run (`Replay`), or the data (`Given`)."""

    def begin(
        self,
        wanted: Wanted,
        *,
        chosen: Sampling,
        weight_version: int,
        seed: int,
        whole: bool = False,
        answers: Answers | None = None,
    ) -> Sampled:
        """Begins a round (`Collector.begin`)."""


@dataclass
class _Begun:
    """The batch that engines are at."""

    number: int
    temperature: float
    course: Course[Batch]
    ask: Callable[[Wanted, int], Sampled]  # a further round, with weights of this version
    round: Sampled


class Batches:
    """Begins, finishes and hands out batches; numbered as the steps that train on them. All ranks call it.

    Attributes:
        ready: those that are sampled and wait for their steps.
        unfinished: none (`PartialBatches` has such).
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        prompts: Prompts,
        source: Source,
        *,
        phase: Phase,
        check: Callable[[int, Shared], None],
        answers: Callable[[int], Answers | None],
    ) -> None:
        """
        Args:
            config: of the run.
            method: says how a batch is sampled as it is begun, and what of it is asked.
            prompts: that are drawn from.
            source: of groups.
            phase: times waiting for them.
            check: looks at all that was sampled for a step.
            answers: of code outside, in a step; this head's own.
        """
        self.ready: dict[int, Batch] = {}
        self.unfinished: Mapping[int, Unfinished] = {}
        self._config, self._method, self._prompts, self._source = config, method, prompts, source
        self._phase, self._check, self._answers = phase, check, answers
        self._begun: _Begun | None = None
        self._newest = 0  # batch that was begun
        self._served = 0  # version that engines have

    def go_on(self, step: int, ready: Mapping[int, Batch], unfinished: Mapping[int, Unfinished]) -> None:
        """After a checkpoint of a step, with the batches that it has; nothing may be under way."""
        assert not unfinished
        self.ready = dict(ready)
        self._newest = max([step, *ready])

    def take(self, step: int) -> Batch:
        """What a step trains on. Where it is not sampled yet, it is now.

        Raises:
            RapoError: it cannot be (`Sampled.finish`), or the method asks for what there is not.
        """
        while step not in self.ready:
            if self._begun is None:
                self._begin()
            self._finish(now=step - 1)
        found = self.ready.pop(step)
        self.run_ahead(step - 1)
        return found

    def run_ahead(self, version: int) -> None:
        """Begins the batch, if there is one, that weights which engines have now are to sample ahead."""
        self._served = version
        ahead = self._config.rollout.max_staleness
        last = min(version + 1 + ahead, self._config.run.steps)
        if ahead and self._begun is None and self._newest < last:
            self._begin()

    def settle(self, now: int) -> None:
        """Before weights are published: all that the engines' present ones are to sample is sampled.

        Args:
            now: the version that is about to be published.

        Raises:
            RapoError: as `take`.
        """
        while self._begun is not None:
            self._finish(now)
            self.run_ahead(self._served)

    def close(self) -> None:
        """Gives up what is under way."""
        if self._begun is not None:
            self._begun.round.give_up()

    def _begin(self) -> None:
        number = self._newest + 1
        sampling = sampling_of(self._method, self._config)
        begin = partial(
            self._source.begin,
            chosen=sampling,
            seed=seed_of(number, self._config),
            whole=self._method.reads_responses,
            answers=self._answers(number),
        )

        def ask(wanted: Wanted, version: int) -> Sampled:
            return begin(wanted, weight_version=version)

        rollout = self._config.rollout
        course = collect(self._prompts, rollout.prompts_per_step, self._method, rollout.dynamic_sampling)
        first = ask(next(course), self._served)
        self._newest = number
        self._begun = _Begun(number, sampling.temperature, course, ask, first)

    def _finish(self, now: int) -> None:
        begun = self._begun
        assert begun is not None

        def finish() -> Shared:
            found = begun.round.finish(self._phase, now)
            self._served = begun.round.weight_version
            return found

        def sample(wanted: Wanted) -> Shared:
            begun.round = begun.ask(wanted, self._served)
            return finish()

        batch = follow(begun.course, sample, finish())
        self._begun = None
        self._check(begun.number, batch.sampled)
        self.ready[begun.number] = replace(batch, temperature=begun.temperature)
