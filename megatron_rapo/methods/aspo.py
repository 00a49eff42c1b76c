"""ASPO ("Understanding Tool-Integrated Reasoning", arXiv 2508.19201): earlier calls of tools.

    A_i = A_GRPO,i + clip( δ (p_i − mean p) / mean L, −k A_GRPO,i, k A_GRPO,i )  of right responses that call

p_i is the token at which the response first calls, L a response's length, both means over the group's right
responses that call; δ < 0, so that calls before the mean are preferred. The bonus is less than the
advantage itself (k < 1), so that it never changes its sign: a right answer stays worth learning, whenever
it calls. Shaping the reward instead would be undone by standardisation. After the abstract and public
descriptions. Ours: a call is the end of a turn after which tokens were given; a group with one such
response has no bonus, and neither has A ≤ 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.overlong import sampled_tokens
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import BelowOne


class ASPO(Method):
    """Right responses that call a tool earlier than the group's others have a larger advantage."""

    class Options(Clipping):
        """ASPO (arXiv 2508.19201)."""

        method: str = "aspo"
        shaping: float = Field(
            -2.0,
            lt=0,
            allow_inf_nan=False,
            description="δ: of how much later than the mean a response calls.",
        )
        bound: BelowOne = Field(0.7, description="k: the bonus is at most this multiple of the advantage.")

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        rewards = known_rewards(groups)
        plain, lengths = standardised(rewards), sampled_tokens(groups)
        first = first_calls(groups)
        shaped = ~np.ma.filled(rewards <= 0.0, True) & ~np.ma.getmaskarray(first) & (plain > 0.0)
        first, lengths = (np.ma.array(values, mask=~shaped) for values in (first, lengths))
        later = (first - first.mean(axis=1, keepdims=True)) / lengths.mean(axis=1, keepdims=True)
        bonus = np.ma.filled(self.options.shaping * later, 0.0)
        return plain + np.clip(bonus, -self.options.bound * np.abs(plain), self.options.bound * np.abs(plain))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]


def first_calls(groups: Sequence[Group]) -> Any:
    """`[groups, episodes]`: tokens sampled before the first answer of a tool; masked where there is none.

    That is the first turn's length, of the episode's first sequence, where another turn follows it.
    """
    found = np.full((len(groups), max(len(group.episodes) for group in groups)), np.nan)
    for row, group in zip(found, groups, strict=True):
        for number, one in enumerate(group.episodes):
            turns = one.episode.sequences[0].turns
            if len(turns) > 1:
                row[number] = turns[0]
    return np.ma.masked_invalid(found)
