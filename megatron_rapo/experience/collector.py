"""Groups for prompts: every data-parallel head runs the episodes of its share; all ranks hear of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.environments.runner import Rollout, Runner
from megatron_rapo.environments.running import Judge, Tries
from megatron_rapo.environments.times import Times
from megatron_rapo.episode.choices import ChoiceShape
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN
from megatron_rapo.experience.course import Phase, Wanted
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.experience.sharing import Shared, share
from megatron_rapo.methods.sampling import Sampling as Chosen
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.rollout.requests import Sampling


class Collector:
    """Runs episodes on heads, and tells all ranks what came of them.

    Attributes:
        runner: this head's own; None on other ranks.
        judge: the reward of the training data, this head's own; None on other ranks.
    """

    def __init__(
        self,
        placement: Placement,
        engines: SharedEngines,
        runner: Runner | None,
        judge: Judge | None,
        recover: Callable[[int], object] | None = None,
        experts: ChoiceShape | None = None,
    ) -> None:
        """
        Args:
            placement: this rank's.
            engines: that are asked.
            runner: this head's own; None on other ranks.
            judge: the reward of the training data, this head's own; None on other ranks.
            recover: makes engines serve a version of the weights again, on all ranks, where a rollout has
                lost too many; without it such a rollout is an error.
            experts: of the choices that engines are to tell; None: none are needed.
        """
        self.placement = placement
        self.engines = engines
        self.runner = runner
        self.judge = judge
        self._recover = recover
        self._experts = experts

    def begin(
        self,
        wanted: Wanted,
        *,
        chosen: Chosen,
        weight_version: int,
        seed: int,
        whole: bool = False,
        answers: Answers | None = None,
    ) -> Begun:
        """Begins the episodes of a round; all ranks call it.

        Args:
            wanted: prompts, and which episodes of each.
            chosen: how many responses of each prompt, and how they are drawn.
            weight_version: that must have sampled every token.
            seed: of this batch of samples.
            whole: whether all ranks get tokens and texts (`Method.reads_responses`).
            answers: of code outside, in this step; this head's own.
        """
        sampling = Sampling(
            chosen.responses_per_prompt,
            chosen.max_response_tokens,
            chosen.temperature,
            weight_version,
            seed,
            experts=self._experts,
        )
        return Begun(self, wanted, sampling, whole=whole, answers=answers)

    def start(
        self, prompts: Sequence[Prompt], tries: Sequence[Tries], sampling: Sampling, answers: Answers | None
    ) -> AbstractContextManager[Rollout] | None:
        """This head's episodes of its prompts; None on other ranks."""
        if self.runner is None or self.judge is None:
            return None
        return self.runner.begin(prompts, sampling, self.judge, tries, answers)

    def until_complete(
        self, ask: Callable[[], int], weight_version: int, phase: Phase = lambda name: nullcontext()
    ) -> None:
        """Has every head ask its engines until nothing is missing; all ranks call it.

        Args:
            ask: samples what is missing here, as far as engines are left; returns how much still is.
            weight_version: that engines get again before the next try.
            phase: times the wait for other heads, as `rollout`, and for engines to come back, as `publish`.

        Raises:
            RapoError: engines refused, or too few are left.
        """
        while True:
            missing = ask()
            with phase("rollout"):
                if not self.engines.any_missing(missing):
                    return
            if self._recover is None:
                raise self.engines.too_few()
            with phase("publish"):
                self._recover(weight_version)


class Begun:
    """A round that has begun: this head's episodes run while its rank does other things.

    What engines that failed leave open is sampled from those that are left, or that came back.

    Attributes:
        weight_version: of the weights that sample what is still missing.
    """

    def __init__(
        self,
        collector: Collector,
        wanted: Wanted,
        sampling: Sampling,
        *,
        whole: bool,
        answers: Answers | None,
    ) -> None:
        """See `Collector.begin`."""
        placement = collector.placement
        own = slice(placement.data_rank, None, placement.layout.data_parallel)
        plain = Tries(0, (PLAIN,) * sampling.responses_per_prompt)
        self._collector = collector
        self._problems = [prompt.problem for prompt in wanted.prompts]
        self._mine = list(wanted.prompts[own])
        self._tries = list((wanted.tries or [plain] * len(wanted.prompts))[own])
        self._sampling, self._whole, self._answers = sampling, whole, answers
        self._groups = {
            place: Group(prompt.problem, ())
            for place, prompt in enumerate(self._mine)
            if not self._tries[place].guides and collector.runner is not None
        }
        self._times = Times()
        self._under_way = ExitStack()
        self._rollout: Rollout | None = None
        self._start()

    @property
    def weight_version(self) -> int:
        """Of the weights that sample what is still missing."""
        return self._sampling.weight_version

    def finish(self, phase: Phase, now: int) -> Shared:
        """The prompts' groups, in order (`Sampled.finish`).

        Raises:
            RapoError: engines refused, or too few are left; or environment or reward are at fault.
        """

        def ask() -> int:
            """Waits for what is under way here; how much is missing still."""
            if self._rollout is None:
                self._sampling = replace(self._sampling, weight_version=now)
                self._start()
            return self._gather(phase)

        with self._under_way:
            self._collector.until_complete(ask, now, phase)
        with phase("reward"):
            mine = [self._groups[place] for place in sorted(self._groups)]
            shared = share(self._problems, mine, self._collector.placement, whole=self._whole)
        return replace(shared, times=self._times)

    def give_up(self) -> None:
        """Ends what is under way here."""
        self._under_way.close()

    @property
    def _missing(self) -> list[int]:
        return [place for place in range(len(self._mine)) if place not in self._groups]

    def _start(self) -> None:
        """Asks for what is missing here."""
        missing = self._missing
        prompts, tries = [self._mine[place] for place in missing], [self._tries[place] for place in missing]
        rollout = self._collector.start(prompts, tries, self._sampling, self._answers)
        self._rollout = None if rollout is None else self._under_way.enter_context(rollout)

    def _gather(self, phase: Phase) -> int:
        rollout, self._rollout = self._rollout, None
        if rollout is None:
            return 0
        missing = self._missing
        with self._under_way.pop_all():
            with phase("rollout"):
                rollout.wait_until_sampled()
            with phase("reward"):
                found = rollout.groups()
        self._times.extend(rollout.times)
        answered = zip(missing, found, strict=True)
        self._groups.update((place, group) for place, group in answered if group is not None)
        return len(self._missing)
