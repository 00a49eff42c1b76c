"""Rounds that engines sample to their end (`ahead.batches.Source`)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.environments.recorded import Answers
from megatron_rapo.environments.times import Times
from megatron_rapo.episode.group import Group
from megatron_rapo.experience.course import Phase, Wanted
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.simulation.engine import Request
from megatron_rapo.simulation.groups import group
from megatron_rapo.simulation.sampling import Sampler


class SimulatedSource:
    """Where the groups of a simulated run come from."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def begin(
        self,
        wanted: Wanted,
        *,
        chosen: Sampling,
        weight_version: int,
        seed: int,
        whole: bool = False,
        answers: Answers | None = None,
    ) -> SimulatedRound:
        """Begins a round (`Collector.begin`); nobody has its tokens."""
        return SimulatedRound(self._sampler, wanted, chosen, weight_version, seed)


class SimulatedRound:
    """A round that has begun (`experience.course.Sampled`).

    Attributes:
        weight_version: of the weights that sample what is still missing.
    """

    def __init__(
        self, sampler: Sampler, wanted: Wanted, chosen: Sampling, weight_version: int, seed: int
    ) -> None:
        self.weight_version = weight_version
        self._sampler, self._chosen = sampler, chosen
        counts = [chosen.responses_per_prompt] * len(wanted.prompts)
        if wanted.tries is not None:
            counts = [len(tries.guides) for tries in wanted.tries]
        self._drawn = sampler.draw(seed, wanted.prompts, counts, chosen.max_response_tokens)
        self._parts = [
            part for part in sampler.parts(len(wanted.prompts)) if any(counts[place] for place in part)
        ]
        self._versions: dict[int, int] = {}  # of the requests, by number
        self._requests = [self._request(number, part) for number, part in enumerate(self._parts)]
        self._round = sampler.pool.begin(self._requests)

    def finish(self, phase: Phase, now: int) -> Shared:
        """Waits for it (`Sampled.finish`).

        Raises:
            RapoError: too few engines are left, and cannot come back.
        """
        began = self._round.begun
        while missing := self._sampler.wait(self._round, phase):
            self._note_versions(missing)
            self.weight_version = now
            self._sampler.recover(phase, now)
            self._round = self._sampler.pool.begin(missing)
        self._note_versions([])
        latest = max((request.ends[-1] for request in self._requests), default=began)
        self._sampler.judge(self._requests, phase)
        return self._shared(latest - began)

    def give_up(self) -> None:
        """What is under way when a run ends does no harm: time stands still then."""

    def _request(self, number: int, part: list[int]) -> Request:
        tokens = [length for place in part for length in self._drawn[place][0]]
        return Request(tokens, [self._sampler.prompt_tokens] * len(tokens), len(part), number)

    def _note_versions(self, missing: list[Request]) -> None:
        absent = {request.number for request in missing}
        for number in range(len(self._requests)):
            if number not in absent:
                self._versions.setdefault(number, self.weight_version)

    def _shared(self, seconds: float) -> Shared:
        places = {place: number for number, part in enumerate(self._parts) for place in part}
        heads = self._sampler.config.parallel.data_parallel
        groups = []
        for place, (lengths, rewards) in enumerate(self._drawn):
            version = self._versions.get(places.get(place, -1), self.weight_version)
            sampled = [((version, length),) for length in lengths]
            groups.append(
                group(self._sampler.prompt_tokens, sampled, rewards, self._chosen.max_response_tokens)
            )
        waited = sum(end - self._round.begun for request in self._requests for end in request.ends)
        of_heads = [place % heads for place in range(len(groups))]
        return Shared(groups, of_heads, {}, sampled_times(groups, waited, seconds))


def sampled_times(groups: Sequence[Group], waited: float, seconds: float) -> Times:
    """Of a batch's episodes, which waited for engines so long in all and had nothing to do of their own."""
    times = Times(sum(len(one.episodes) for one in groups), max(0.0, waited), 0.0, seconds)
    times.open.seconds = times.asking.seconds = seconds
    return times
