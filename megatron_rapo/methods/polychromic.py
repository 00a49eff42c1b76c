"""Polychromic objectives (arXiv 2509.25424): sets of responses are rewarded, if good and diverse.

    f(S) = mean_{y ∈ S} r(y) · d(S),   S of n responses to one prompt
    A_i = mean of f over the sets with y_i, less the mean of f over all sets

A set has one advantage, that of all its members: a wrong response in a good and diverse set is not pushed
down by itself. After the abstract and public descriptions (the paper's policies act in environments, with
vine sampling from states on the way and a critic's baseline). Ours: all sets of n of a group's known
responses instead of some that are drawn, so that there is no further noise; d is the share of different
answers (or texts) in the set; the baseline is the mean over sets; PPO's clip, no divergence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.diversity import distinct_share
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import Term

_MOST_SETS = 20_000  # of a group: beyond, a step would take seconds


class Polychromic(Method):
    """Every set of n responses earns its mean reward times its diversity; a response the mean of its sets."""

    example = MappingProxyType({"set_size": 2})

    class Options(Clipping):
        """Polychromic objectives (arXiv 2509.25424)."""

        method: str = "polychromic"
        set_size: int = Field(4, ge=2, description="n: responses of a set.")
        diversity: Literal["answers", "texts"] = Field(
            "answers",
            description="d(S), the share of different ones among the set's: `answers`, as they were judged, "
            "none where none was found; or whole `texts`, which all ranks then hold.",
        )

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        size, responses = options.set_size, configured.responses_per_prompt
        if size >= responses:
            raise ValueError(
                f"set_size = {size} of rollout.responses_per_prompt = {responses} leaves no other set to "
                "compare with; lower it"
            )
        if (sets := math.comb(responses, size)) > _MOST_SETS:
            raise ValueError(
                f"set_size = {size} of rollout.responses_per_prompt = {responses} are {sets:,} sets a "
                f"prompt, more than {_MOST_SETS:,}; change one of them"
            )

    @property
    def reads_responses(self) -> bool:  # type: ignore[override]
        return self.options.diversity == "texts"

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return [self._of_group(group).tolist() for group in groups]

    def _of_group(self, group: Group) -> npt.NDArray[np.float64]:
        """0 where fewer than n rewards are known: there is no set."""
        found, size = np.zeros(len(group.episodes)), self.options.set_size
        known = [number for number, reward in enumerate(group.rewards) if reward is not None]
        sets = np.array(list(combinations(known, size)), dtype=np.int64).reshape(-1, size)
        if not len(sets):
            return found
        members = [self._member(one) for one in group.episodes]
        rewards = np.array([reward or 0.0 for reward in group.rewards])
        diversity = np.array([distinct_share([members[number] for number in one]) for one in sets])
        score = rewards[sets].mean(axis=1) * diversity
        totals, counts = np.zeros(len(found)), np.zeros(len(found))
        np.add.at(totals, sets, score[:, None])
        np.add.at(counts, sets, 1.0)
        found[known] = (totals / counts.clip(min=1.0))[known] - score.mean()
        return found

    def _member(self, scored: ScoredEpisode) -> str | None:
        """What makes a response another one."""
        if self.options.diversity == "answers":
            return scored.verification.extracted
        assert isinstance(scored.episode, Episode)
        return scored.episode.answer

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
