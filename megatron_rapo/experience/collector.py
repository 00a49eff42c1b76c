"""Groups for prompts: every data-parallel head runs the episodes of its share; all ranks hear of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import Judge, Tries
from megatron_rapo.environments.times import Times
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.experience.sharing import Shared, share
from megatron_rapo.methods.sampling import Sampling as Chosen
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.rollout.requests import Sampling

Phase = Callable[[str], AbstractContextManager[None]]
"""Times what happens within it (`Observer.phase`)."""


class Collector:
    """Runs episodes on heads, and tells all ranks what came of them.

    Attributes:
        runner: this head's own; None on other ranks.
    """

    def __init__(
        self,
        placement: Placement,
        engines: SharedEngines,
        runner: Runner | None,
        judge: Judge | None,
        recover: Callable[[int], object] | None = None,
    ) -> None:
        """
        Args:
            placement: this rank's.
            engines: that are asked.
            runner: this head's own; None on other ranks.
            judge: the reward of the training data, this head's own; None on other ranks.
            recover: makes engines serve a version of the weights again, on all ranks, where a rollout has
                lost too many; without it such a rollout is an error.
        """
        self.placement = placement
        self.engines = engines
        self.runner = runner
        self._judge = judge
        self._recover = recover

    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        chosen: Chosen,
        weight_version: int,
        seed: int,
        phase: Phase,
        whole: bool = False,
        tries: Sequence[Tries] | None = None,
        answers: Answers | None = None,
    ) -> Shared:
        """The prompts' groups, in order; all ranks call it.

        What engines that failed leave open is sampled from those that are left, or that came back.

        Args:
            prompts: the same on all ranks.
            chosen: how many responses of each prompt, and how they are drawn.
            weight_version: that must have sampled every token.
            seed: of this batch of samples.
            phase: times sampling (`rollout`), and what verifying takes after it (`reward`).
            whole: whether all ranks get tokens and texts (`Method.reads_responses`).
            tries: of each prompt, the episodes that its group is to have; default: as `chosen` says.
            answers: of code outside, in this step; this head's own.

        Raises:
            RapoError: engines refused, or too few are left; or environment or reward are at fault.
        """
        own = slice(self.placement.data_rank, None, self.placement.layout.data_parallel)
        mine = list(prompts[own])
        tries = tries or [Tries(0, (PLAIN,) * chosen.responses_per_prompt)] * len(prompts)
        wanted = list(tries[own])
        groups = {
            place: Group(prompt.problem, ())
            for place, prompt in enumerate(mine)
            if not wanted[place].guides and self.runner is not None
        }
        times = Times()
        sampling = Sampling(
            chosen.responses_per_prompt,
            chosen.max_response_tokens,
            chosen.temperature,
            weight_version,
            seed,
        )

        def ask() -> int:
            """Samples what is missing here; how much still is."""
            if self.runner is None or self._judge is None:
                return 0
            missing = [place for place in range(len(mine)) if place not in groups]
            asked, each = [mine[place] for place in missing], [wanted[place] for place in missing]
            with self.runner.begin(asked, sampling, self._judge, each, answers) as rollout:
                with phase("rollout"):
                    rollout.wait_until_sampled()
                with phase("reward"):
                    found = rollout.groups()
            times.extend(rollout.times)
            answered = zip(missing, found, strict=True)
            groups.update((place, group) for place, group in answered if group is not None)
            return len(mine) - len(groups)

        self.until_complete(ask, weight_version, phase)
        with phase("reward"):
            problems = [prompt.problem for prompt in prompts]
            shared = share(problems, [groups[place] for place in sorted(groups)], self.placement, whole=whole)
        return replace(shared, times=times)

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
