"""A run's batches, where a response goes on from one version of the weights to the next.

With n = `rollout.max_staleness`, the batch of step t is begun with the weights of step max(0, t − 1 − n), as
without partial responses. Each version samples at most `rollout.partial_tokens` tokens of a response; that
of step t − 2, the last before the batch is needed, samples it to its end. Which version samples which token
thus follows from the tokens alone, not from how fast anything was.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Protocol

from megatron_rapo.ahead.asking import sampling_of, seed_of
from megatron_rapo.ahead.unfinished import Unfinished
from megatron_rapo.config import RunConfig
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.experience.batch import Batch, Prompts
from megatron_rapo.experience.carried import SoFar
from megatron_rapo.experience.course import Phase
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.sampling import Sampling


class Carried(Protocol):
    """What samples batches by several versions of the weights (`experience.carried.Carried`)."""

    def begin(
        self,
        number: int,
        prompts: Sequence[Prompt],
        chosen: Sampling,
        *,
        seed: int,
        answers: Answers | None,
        so_far: SoFar,
    ) -> None:
        """Begins a batch; the next window samples it."""

    def sample(self, version: int, tokens: int, whole: Container[int]) -> None:
        """Begins a window, with the weights of this version."""

    def wait(self, phase: Phase, now: int) -> None:
        """Waits for the window's end."""

    def finish(self, number: int, phase: Phase, *, whole: bool) -> Shared:
        """The groups of a batch that was sampled to its end."""

    def so_far(self, number: int) -> SoFar:
        """What is sampled of a batch, at a window's end."""

    def close(self) -> None:
        """Gives up all that is under way."""


class PartialBatches:
    """In place of `Batches`; all ranks call it.

    Attributes:
        ready: batches that are sampled and wait for their steps.
        unfinished: the others, as they were when the newest weights were published.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        prompts: Prompts,
        carried: Carried,
        *,
        phase: Phase,
        check: Callable[[int, Shared], None],
        answers: Callable[[int], Answers | None],
    ) -> None:
        """See `Batches`; `carried` samples them."""
        self.ready: dict[int, Batch] = {}
        self.unfinished: Mapping[int, Unfinished] = {}
        self._config, self._method, self._prompts, self._carried = config, method, prompts, carried
        self._phase, self._check, self._answers = phase, check, answers
        self._begun: dict[int, tuple[int, Sampling]] = {}  # first draw of each, and how it is sampled
        self._whole = range(0)  # batches that the window under way samples to their end
        self._under_way = False
        self._newest = 0  # batch that was begun
        self._served = -1  # version whose window was opened

    def go_on(self, step: int, ready: Mapping[int, Batch], unfinished: Mapping[int, Unfinished]) -> None:
        """After a checkpoint of a step, with the batches that it has; nothing may be under way."""
        self.ready, self.unfinished = dict(ready), dict(unfinished)
        for number, one in sorted(unfinished.items()):
            self._prompts.position = one.first
            self._begin(number, one.chosen, one.so_far)
        self._newest = max([step, *ready, *unfinished])

    def take(self, step: int) -> Batch:
        """What a step trains on (`Batches.take`)."""
        if step not in self.ready:
            if not self._under_way:  # at the start nothing is sampled but what the trainer waits for
                self._newest = step
                self._begin(step, sampling_of(self._method, self._config), {})
                self._sample(step - 1, range(step, step + 1))
            self.settle(step - 1)
        found = self.ready.pop(step)
        self.run_ahead(step - 1)
        return found

    def run_ahead(self, version: int) -> None:
        """Has weights that engines have now sample what is theirs of each batch, once."""
        if self._under_way or self._served == version:
            return
        last = min(version + 1 + self._config.rollout.max_staleness, self._config.run.steps)
        while self._newest < last:
            self._newest += 1
            self._begin(self._newest, sampling_of(self._method, self._config), {})
        self._served = version
        if self._begun:
            self._sample(version, range(version + 3))

    def settle(self, now: int) -> None:
        """Before weights are published: what the engines' present ones are to sample is sampled.

        Args:
            now: the version that is about to be published.

        Raises:
            RapoError: as `Batches.take`.
        """
        if self._under_way:
            self._carried.wait(self._phase, now)
            self._under_way = False
            for number in sorted(set(self._begun) & set(self._whole)):
                self.ready[number] = self._finish(number)
        size = self._config.rollout.prompts_per_step
        self.unfinished = {
            number: Unfinished(first, size, chosen, self._carried.so_far(number))
            for number, (first, chosen) in self._begun.items()
        }

    def close(self) -> None:
        """Gives up what is under way."""
        self._carried.close()

    def _begin(self, number: int, chosen: Sampling, so_far: SoFar) -> None:
        self._begun[number] = self._prompts.position, chosen
        self._carried.begin(
            number,
            self._prompts.draw(self._config.rollout.prompts_per_step),
            chosen,
            seed=seed_of(number, self._config),
            answers=self._answers(number),
            so_far=so_far,
        )

    def _sample(self, version: int, whole: range) -> None:
        tokens = self._config.rollout.partial_tokens
        assert tokens is not None
        self._whole, self._under_way = whole, True
        self._carried.sample(version, tokens, whole)

    def _finish(self, number: int) -> Batch:
        first, chosen = self._begun.pop(number)
        sampled = self._carried.finish(number, self._phase, whole=self._method.reads_responses)
        self._check(number, sampled)
        return Batch(sampled.groups, sampled, rounds=0, first=first, temperature=chosen.temperature)
