"""Each problem judged by the reward of its own data set."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from megatron_rapo.episode.outcome import Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.reward.verifier import Verifier


def judge_by_source(verifiers: Mapping[str, Verifier]) -> Callable[[str, Problem], Awaitable[Verification]]:
    """What judges an answer to a problem; `verifiers` are named by the problems' `source`."""

    async def judge(answer: str, problem: Problem) -> Verification:
        return await verifiers[problem.source].score(answer, problem)

    return judge
