"""Unknown rewards, of responses that could not be judged: told at the first, a fault beyond a share."""

from __future__ import annotations

import sys
from textwrap import indent

from megatron_rapo.episode.outcome import Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.parallel.placement import Placement

_EXCERPT = 500  # characters of a problem, and of a response


class UnknownRewards:
    """Watches a run's steps. Such responses are not trained on; many of them mean a broken reward."""

    def __init__(self, limit: float, placement: Placement) -> None:
        """
        Args:
            limit: the share of a step's responses beyond which it is a fault (`reward.unknown_limit`).
            placement: this rank's; the main rank prints.
        """
        self._limit = limit
        self._placement = placement
        self._told = False

    def check(self, step: int, sampled: Shared) -> str | None:
        """Looks at all groups that a step sampled; all ranks call it.

        Returns:
            What is wrong where the share is beyond the limit, on all ranks.
        """
        groups = sampled.groups
        unknown = [
            (place, number)
            for place, group in enumerate(groups)
            for number, reward in enumerate(group.rewards)
            if reward is None
        ]
        responses = sum(len(group.episodes) for group in groups)
        beyond = len(unknown) / max(responses, 1) > self._limit
        if not unknown or (self._told and not beyond):
            return None
        place, number = unknown[0]
        verification = groups[place].episodes[number].verification
        response = sampled.answer(place, number, self._placement)
        told = _described(groups[place].problem, response, verification)
        message = (
            f"step {step}: {len(unknown)} of {responses} rewards are unknown, the first by "
            f"{verification.outcome}: {verification.why}"
        )
        if beyond:
            return (
                f"{message}; that is more than reward.unknown_limit = {self._limit:g}: mend the reward, or "
                f"raise reward.time_limit_s (or reward.unknown_limit)\n{told}"
            )
        self._told = True
        if self._placement.is_main:
            print(
                f"warning: {message}; such responses are not trained on\n{told}", file=sys.stderr, flush=True
            )
        return None


def _described(problem: Problem, response: str, verification: Verification) -> str:
    """What it takes to see the fault again: problem, response and traceback."""
    question, trace = problem.question, verification.trace
    lines = [
        f"problem {problem.id}: {question[:_EXCERPT]!r}{'…' if len(question) > _EXCERPT else ''}",
        f"response: {'…' if len(response) > _EXCERPT else ''}{response[-_EXCERPT:]!r}",
        *([trace] if trace else []),
    ]
    return indent("\n".join(lines), "  ")
