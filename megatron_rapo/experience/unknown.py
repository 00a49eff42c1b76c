"""Unknown rewards, of responses that could not be judged: told at the first, an error beyond a share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from textwrap import indent

from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError

_EXCERPT = 500  # characters of a problem, and of a response


class UnknownRewards:
    """Watches a run's steps. Such responses are not trained on; many of them mean a broken reward."""

    def __init__(self, limit: float, *, tells: bool) -> None:
        """
        Args:
            limit: the share of a step's responses beyond which the run ends (`reward.unknown_limit`).
            tells: whether this rank prints; all ranks see the same groups.
        """
        self._limit = limit
        self._tells = tells

    def check(self, step: int, groups: Sequence[Group]) -> None:
        """Looks at all groups that a step sampled.

        Raises:
            RapoError: on all ranks, where the share is beyond the limit.
        """
        scored = [(group.problem, one) for group in groups for one in group.episodes]
        unknown = [(problem, one) for problem, one in scored if one.reward is None]
        if not unknown:
            return
        problem, first = unknown[0]
        verification = first.verification
        message = (
            f"step {step}: {len(unknown)} of {len(scored)} rewards are unknown, the first by "
            f"{verification.outcome}: {verification.why}"
        )
        if len(unknown) / len(scored) > self._limit:
            raise RapoError(
                f"{message}; that is more than reward.unknown_limit = {self._limit:g}: mend the reward, or "
                f"raise reward.time_limit_s (or reward.unknown_limit)\n{_told(problem, first)}"
            )
        if self._tells:
            self._tells = False
            print(
                f"warning: {message}; such responses are not trained on\n{_told(problem, first)}",
                file=sys.stderr,
                flush=True,
            )


def _told(problem: Problem, scored: ScoredEpisode) -> str:
    """What it takes to see the fault again: problem, response and traceback."""
    question, response, trace = problem.question, scored.episode.answer, scored.verification.trace
    lines = [
        f"problem {problem.id}: {question[:_EXCERPT]!r}{'…' if len(question) > _EXCERPT else ''}",
        f"response: {'…' if len(response) > _EXCERPT else ''}{response[-_EXCERPT:]!r}",
        *([trace] if trace else []),
    ]
    return indent("\n".join(lines), "  ")
