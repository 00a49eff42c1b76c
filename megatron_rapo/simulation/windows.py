"""Batches that several versions of the weights sample (`ahead.partial.Carried`)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.experience.carried import SoFar
from megatron_rapo.experience.course import Phase
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.simulation.engine import Request
from megatron_rapo.simulation.groups import Versions, group
from megatron_rapo.simulation.pool import Round
from megatron_rapo.simulation.rounds import sampled_times
from megatron_rapo.simulation.sampling import Rewards, Sampler


@dataclass
class _Response:
    """One response: its length, and what of it each version sampled."""

    tokens: int
    versions: Versions = ()

    @property
    def left(self) -> int:
        return self.tokens - sum(count for _, count in self.versions)


@dataclass
class _Batch:
    """One that is not sampled to its end, by place."""

    longest: int
    responses: Sequence[Sequence[_Response]]
    rewards: Sequence[Rewards]


class SimulatedWindows:
    """A window samples with one version of the weights."""

    def __init__(self, sampler: Sampler, prompts: int) -> None:
        """`prompts` are of each batch."""
        self._sampler = sampler
        self._parts = sampler.parts(prompts)
        self._open: dict[int, _Batch] = {}
        self._pieces: dict[Request, list[tuple[_Response, int]]] = {}
        self._round: Round | None = None
        self._version, self._seconds = 0, 0.0

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
        counts = [chosen.responses_per_prompt] * len(prompts)
        drawn = self._sampler.draw(seed, prompts, counts, chosen.max_response_tokens)
        responses = [[_Response(length) for length in lengths] for lengths, _ in drawn]
        self._open[number] = _Batch(chosen.max_response_tokens, responses, [rewards for _, rewards in drawn])

    def sample(self, version: int, tokens: int, whole: Container[int]) -> None:
        """Begins a window, with the weights of this version."""
        self._version = version
        self._pieces = {}
        for number, part in enumerate(self._parts):
            pieces = [
                (one, one.left if batch in whole else min(tokens, one.left))
                for batch, of in self._open.items()
                for place in part
                for one in of.responses[place]
                if one.left
            ]
            if pieces:
                self._pieces[self._request(number, pieces)] = pieces
        self._round = self._sampler.pool.begin(list(self._pieces))

    def wait(self, phase: Phase, now: int) -> None:
        """Waits for the window's end.

        Raises:
            RapoError: too few engines are left, and cannot come back.
        """
        assert self._round is not None
        began = self._round.begun
        left = dict(self._pieces)
        while missing := self._sampler.wait(self._round, phase):
            absent = set(missing)
            self._note(pieces for request, pieces in left.items() if request not in absent)
            left = {request: left[request] for request in missing}
            self._version = now
            self._sampler.recover(phase, now)
            self._round = self._sampler.pool.begin(missing)
        self._note(left.values())
        self._seconds = max((request.ends[-1] for request in self._pieces), default=began) - began

    def finish(self, number: int, phase: Phase, *, whole: bool) -> Shared:
        """The groups of a batch that was sampled to its end."""
        batch = self._open.pop(number)
        self._sampler.judge(self._pieces, phase)
        groups = [
            group(self._sampler.prompt_tokens, [one.versions for one in responses], rewards, batch.longest)
            for responses, rewards in zip(batch.responses, batch.rewards, strict=True)
        ]
        heads = self._sampler.config.parallel.data_parallel
        times = sampled_times(groups, 0.0, self._seconds)
        return Shared(groups, [place % heads for place in range(len(groups))], {}, times)

    def so_far(self, number: int) -> SoFar:
        """Nothing: a simulated run makes no checkpoint."""
        return {}

    def close(self) -> None:
        """What is under way when a run ends does no harm: time stands still then."""

    def _request(self, number: int, pieces: Sequence[tuple[_Response, int]]) -> Request:
        """Contexts are computed anew in each window; one that no version has sampled of is its group's."""
        prompt = self._sampler.prompt_tokens
        contexts = [prompt + one.tokens - one.left for one, _ in pieces]
        begun = sum(bool(one.versions) for one, _ in pieces)
        each = self._sampler.config.rollout.responses_per_prompt
        prefilled = begun + -(-(len(pieces) - begun) // each)
        return Request([tokens for _, tokens in pieces], contexts, prefilled, number)

    def _note(self, pieces: Iterable[Sequence[tuple[_Response, int]]]) -> None:
        for of_request in pieces:
            for one, tokens in of_request:
                one.versions = _with(one.versions, self._version, tokens)


def _with(versions: Versions, version: int, tokens: int) -> Versions:
    if versions and versions[-1][0] == version:
        return (*versions[:-1], (version, versions[-1][1] + tokens))
    return (*versions, (version, tokens))
