"""Batches whose responses several versions of the weights sample, on the heads that sample them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.generating import Turns
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.environments.runner import Episodes
from megatron_rapo.environments.running import Tries
from megatron_rapo.environments.times import Times
from megatron_rapo.environments.windows import Windows
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.course import Phase
from megatron_rapo.experience.sharing import Shared, share
from megatron_rapo.methods.sampling import Sampling as Chosen
from megatron_rapo.rollout.requests import Sampling

SoFar = dict[int, list[Turns]]
"""What is sampled of a batch: of each prompt of this head, by its place in the batch, its episodes' turns."""


class Carried:
    """Batches of as many prompts each. All ranks call each method together."""

    def __init__(self, collector: Collector, prompts: int) -> None:
        """
        Args:
            collector: whose engines and episodes they are.
            prompts: of a batch.
        """
        placement, pool = collector.placement, collector.engines.pool
        self._collector = collector
        self._own = range(placement.data_rank, prompts, placement.layout.data_parallel)
        self._prompts: dict[int, Sequence[Prompt]] = {}
        self._windows: Windows | None = None
        if collector.runner is not None and pool is not None:
            self._windows = Windows(collector.runner, pool, len(self._own))
        self._sampling: Sampling | None = None  # of the newest window
        self._lost = False

    def begin(
        self,
        number: int,
        prompts: Sequence[Prompt],
        chosen: Chosen,
        *,
        seed: int,
        answers: Answers | None,
        so_far: SoFar,
    ) -> None:
        """Begins a batch, or goes on with one of a checkpoint; the next window samples it.

        Args:
            number: of the batch.
            prompts: the same on all ranks.
            chosen: how many responses of each, and how they are drawn.
            seed: of this batch of samples.
            answers: of code outside; this head's own.
            so_far: what is sampled already, of the places of this head; those that it lacks begin anew.
        """
        self._prompts[number] = prompts
        self._sampling = sampling = Sampling(
            chosen.responses_per_prompt, chosen.max_response_tokens, chosen.temperature, 0, seed
        )
        if self._windows is None or self._collector.judge is None:
            return
        responses = range(chosen.responses_per_prompt)
        tries = Tries(0, (PLAIN,) * len(responses))
        episodes = Episodes(
            [prompts[place] for place in self._own],
            [tries] * len(self._own),
            sampling,
            self._collector.judge,
            answers,
            [so_far.get(place) or [{} for _ in responses] for place in self._own],
        )
        self._windows.begin(number, episodes)

    def sample(self, version: int, tokens: int, whole: Container[int]) -> None:
        """Begins a window (`Windows.open`), with the weights of this version."""
        assert self._sampling is not None
        self._sampling = replace(self._sampling, weight_version=version)
        self._lost = False
        if self._windows is not None:
            self._windows.open(self._sampling, tokens, whole)

    def wait(self, phase: Phase, now: int) -> None:
        """Waits for the window's end.

        Args:
            phase: times it, as `rollout`.
            now: the version of the policy's weights, with which is sampled what lost engines leave open.

        Raises:
            RapoError: engines refused, or too few are left; or environment or reward are at fault.
        """

        def ask() -> int:
            windows = self._windows
            if windows is None:
                return 0
            if self._lost:
                assert self._sampling is not None
                self._sampling = replace(self._sampling, weight_version=now)
                windows.go_on(self._sampling)
            with phase("rollout"):
                self._lost = windows.wait()
            return int(self._lost)

        self._collector.until_complete(ask, now, phase)

    def finish(self, number: int, phase: Phase, *, whole: bool) -> Shared:
        """The groups of a batch that was sampled to its end (`Collector.begin`)."""
        prompts, times = self._prompts.pop(number), Times()
        mine: list[Group] = []
        with phase("reward"):
            if self._windows is not None:
                mine, times = self._windows.finish(number)
            problems = [prompt.problem for prompt in prompts]
            shared = share(problems, mine, self._collector.placement, whole=whole)
        return replace(shared, times=times)

    def so_far(self, number: int) -> SoFar:
        """What this head has sampled of a batch, at a window's end."""
        if self._windows is None:
            return {}
        return dict(zip(self._own, self._windows.so_far(number), strict=True))

    def close(self) -> None:
        """Gives up all that is under way here."""
        if self._windows is not None:
            self._windows.close()
