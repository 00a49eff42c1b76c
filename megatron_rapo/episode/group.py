"""The episodes of one problem, over which group-relative advantages are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_rapo.episode.beginnings import Beginning, beginnings
from megatron_rapo.episode.brief import BriefSequence
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.problem import Problem


@dataclass(frozen=True)
class Group:
    """The scored episodes of one problem."""

    problem: Problem
    episodes: tuple[ScoredEpisode, ...]

    @property
    def rewards(self) -> list[float | None]:
        """Of each episode; None where it is unknown."""
        return [episode.reward for episode in self.episodes]

    def brief(self) -> Group:
        """It without tokens and texts."""
        pairs = zip(self.episodes, self.beginnings(), strict=True)
        return replace(self, episodes=tuple(episode.brief(shared) for episode, shared in pairs))

    def beginnings(self) -> list[list[tuple[Beginning, ...]]]:
        """What each sequence of each episode begins with like others of the group."""
        sequences = [sequence for one in self.episodes for sequence in one.episode.sequences]
        whole = [sequence.token_ids for sequence in sequences if not isinstance(sequence, BriefSequence)]
        found = iter(beginnings(whole, self.problem.token_ids))
        return [
            [
                sequence.beginnings if isinstance(sequence, BriefSequence) else next(found)
                for sequence in one.episode.sequences
            ]
            for one in self.episodes
        ]


def known_rewards(groups: Sequence[Group]) -> Any:
    """`[groups, episodes]` fp64, a masked array (`numpy.ma`): unknown rewards are masked.

    So is what smaller groups have fewer than the largest.
    """
    values = np.full((len(groups), max((len(group.episodes) for group in groups), default=0)), np.nan)
    for row, group in zip(values, groups, strict=True):
        row[: len(group.episodes)] = [np.nan if reward is None else reward for reward in group.rewards]
    return np.ma.masked_invalid(values)
