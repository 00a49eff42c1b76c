"""Groups as a batch has them, of lengths alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache

from megatron_rapo.episode.brief import BriefEpisode, BriefSequence
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem

Versions = tuple[tuple[int, int], ...]
"""Versions of the weights, and how many tokens each sampled."""

PROBLEM = Problem("simulated", "")


def group(
    prompt_tokens: int, sampled: Sequence[Versions], rewards: Sequence[float] | None, longest: int
) -> Group:
    """Of so many responses; those without a recorded reward count as not judged."""
    return Group(
        PROBLEM,
        tuple(
            _episode(prompt_tokens, versions, None if rewards is None else float(rewards[place]), longest)
            for place, versions in enumerate(sampled)
        ),
    )


def sampled_tokens(groups: Iterable[Group]) -> list[int]:
    """Of each response of these groups."""
    return [one.episode.sequences[0].turns[0] for of in groups for one in of.episodes]


@lru_cache(maxsize=1 << 16)
def _episode(prompt_tokens: int, versions: Versions, reward: float | None, longest: int) -> ScoredEpisode:
    tokens = sum(count for _, count in versions)
    sequence = BriefSequence(prompt_tokens + tokens, (tokens,), 0, versions, tokens)
    episode = BriefEpisode((sequence,), None, truncated=tokens >= longest, facts={})
    return ScoredEpisode(episode, _verification(reward))


@cache
def _verification(reward: float | None) -> Verification:
    if reward is None or math.isnan(reward):
        return Verification(Outcome.CRASH, why="simulated")
    return Verification(Outcome.CORRECT if reward > 0 else Outcome.WRONG, reward=reward)
