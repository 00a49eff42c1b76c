"""D3S (Dynamic Dual-level Down-Sampling, arXiv 2509.22115): the samples and tokens that teach most.

    of each group     the ⌈κ G⌉ responses whose advantages have the largest variance
    of all tokens     the ⌈ν N⌉ of these responses with the largest |A_t| · H_t
    κ and ν grow from their first values to 1 over the first T steps

on GRPO's advantages and clipped surrogate, averaged over the tokens that are left. After the abstract and
public descriptions. Ours: the largest variance in a group is that of its smallest and largest rewards, so
of all splits into these the best is taken; H is of the policy that starts the step; both shares grow
linearly; tokens that tie with the last one stay; the first values of κ and ν, and T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.masking import masked
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import PositiveInt

if TYPE_CHECKING:
    from torch import Tensor


class D3S(Method):
    """The responses of each group whose advantages vary most, and the tokens with the largest |A| · H."""

    class Options(Clipping):
        """D3S (arXiv 2509.22115)."""

        method: str = "d3s"
        sample_share: float = Field(0.5, gt=0, le=1, description="κ: of a group's responses, at first.")
        token_share: float = Field(0.2, gt=0, le=1, description="ν: of the tokens, at first.")
        relax_steps: PositiveInt = Field(
            100, description="T: after so many steps all samples and tokens are in the loss."
        )

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self.steps = 0  # that are over

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        chosen, rewards = super().choose(groups), known_rewards(groups)
        share = self._share(self.options.sample_share)
        return [
            [bool(one) and number in kept for number, one in enumerate(of_group)]
            for of_group, kept in zip(chosen, (_spread(row, share) for row in rewards), strict=True)
        ]

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def weigh(self, tokens: Annotated) -> Tensor:
        """The weights of the tokens that are left, which add up to what all did."""
        score = tokens.advantages.abs() * tokens.old_entropies
        scores = tokens.of_all_ranks(score[tokens.weights > 0])
        if not len(scores):
            return tokens.weights
        left = math.ceil(self._share(self.options.token_share) * len(scores))
        return masked(tokens, score >= scores.kthvalue(len(scores) - left + 1).values)

    def _share(self, first: float) -> float:
        """Of samples or tokens, in this step."""
        return first + (1.0 - first) * min(1.0, self.steps / self.options.relax_steps)

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]

    def learn(self, measured: Mapping[str, float]) -> None:
        """Another step is over."""
        self.steps += 1

    def state(self) -> Any:
        return {"steps": self.steps}

    def restore(self, state: Any) -> None:
        self.steps = state["steps"]


def _spread(rewards: Any, share: float) -> set[int]:
    """The numbers of the ⌈share · n⌉ responses whose rewards are known and vary most; of equals the first."""
    known = [number for number, masked in enumerate(np.ma.getmaskarray(rewards)) if not masked]
    upwards = sorted(known, key=lambda number: rewards[number])
    downwards = sorted(known, key=lambda number: -rewards[number])
    count = math.ceil(share * len(known))
    splits = [{*upwards[:low], *downwards[: count - low]} for low in range(count, -1, -1)]
    whole = [split for split in splits if len(split) == count]
    return max(whole, key=lambda split: np.var([rewards[number] for number in split])) if count else set()
