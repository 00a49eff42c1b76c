"""EAPO (Efficiency-Aware, IterResearch, arXiv 2511.07327): rewards are discounted over rounds.

    r_t = γ^(T − t) R,   A_t = (r_t − mean r) / std r   over all rounds of all the group's episodes

An episode is of T rounds, each a sequence of its own with a context that was built anew; R is its reward.
Earlier rounds of long episodes earn less, so that short paths are preferred. After the abstract and public
descriptions. Ours: rounds are the episode's sequences; GRPO's clip. The paper cuts samples to a number that
its ranks divide; here any number of sequences is spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import Field

from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term


class EAPO(Method):
    """Each round of an episode earns its reward, discounted by the rounds that follow it."""

    class Options(Clipping):
        """EAPO (arXiv 2511.07327)."""

        method: str = "eapo"
        discount: float = Field(0.995, gt=0, le=1, description="γ: of a reward, for each round that follows.")

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return [self._of_group(group) for group in groups]

    def _of_group(self, group: Group) -> list[npt.NDArray[np.float64]]:
        rewards = [self._rewards(one) for one in group.episodes]
        of_rounds = standardised(np.ma.masked_invalid(np.concatenate(rewards))[None])[0]
        ends = np.cumsum([len(own) for own in rewards])[:-1]
        return [
            np.repeat(own, [sequence.sampled_tokens for sequence in one.episode.sequences])
            for own, one in zip(np.split(of_rounds, ends), group.episodes, strict=True)
        ]

    def _rewards(self, scored: ScoredEpisode) -> npt.NDArray[np.float64]:
        """Of each round; NaN where the episode's is unknown."""
        rounds = len(scored.episode.sequences)
        reward = np.nan if scored.reward is None else scored.reward
        return reward * self.options.discount ** np.arange(rounds - 1, -1, -1.0)

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
