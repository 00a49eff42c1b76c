"""Unknown rewards, of verifications that timed out or crashed: told at the first, an error beyond a share."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_rapo.episode.group import Group
from megatron_rapo.errors import RapoError


class UnknownRewards:
    """Watches a run's steps. Such responses are not trained on; many of them mean a broken verifier."""

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
        outcomes = [one.verification.outcome for group in groups for one in group.episodes]
        unknown = sum(not outcome.known for outcome in outcomes)
        if not unknown:
            return
        why = next(group.why_unknown for group in groups if group.why_unknown is not None)
        message = f"step {step}: {unknown} of {len(outcomes)} rewards are unknown, the first by {why}"
        if unknown / len(outcomes) > self._limit:
            raise RapoError(
                f"{message}; that is more than reward.unknown_limit = {self._limit:g}: mend the verifier, or "
                "raise reward.time_limit_s (or reward.unknown_limit)"
            )
        if self._tells:
            self._tells = False
            print(f"warning: {message}; such responses are not trained on", file=sys.stderr, flush=True)
