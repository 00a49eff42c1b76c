"""Open-RS (Reinforcement Learning for Reasoning in Small LLMs, arXiv 2503.16219): GRPO on length and form.

    r = 2 · cosine + 1 · format                                                             (its experiment 3)
    cosine = long + ½ (short − long) (1 + cos(π |o| / L)):  from 1 (short) to ½ (long) of a right response,
                                                            from 0 (short) to −½ (long) of a wrong one
    A_i = (r_i − mean r) / std r

GRPO else. After the abstract, public descriptions and the authors' code (knoveleng/open-rs), whose bounds and
weights these are: with its `min_value_wrong` 0 and `max_value_wrong` −½, the two being swapped for wrong
responses, short ones earn 0. Ours: lengths are of tokens, where the code counts characters; `format` is a
fact that the reward function tells (docs/rewards.md), since what form is wanted is the user's affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.facts import known_facts
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.guided import solved
from megatron_rapo.methods.method import OfEpisodes
from megatron_rapo.methods.overlong import sampled_tokens
from megatron_rapo.section import NonNegativeFloat, PositiveFloat, PositiveInt


class OpenRS(GRPO):
    """GRPO whose reward falls with length along a cosine, and has a part for form."""

    class Options(GRPO.Options):
        """Open-RS (arXiv 2503.16219)."""

        method: str = "open_rs"
        correct_short: float = Field(1.0, description="The cosine of a right response of no length.")
        correct_long: float = Field(0.5, description="The cosine of a right response of `cosine_tokens`.")
        wrong_short: float = Field(0.0, description="The cosine of a wrong response of no length.")
        wrong_long: float = Field(-0.5, description="The cosine of a wrong response of `cosine_tokens`.")
        cosine_tokens: PositiveInt | None = Field(
            None, description="L: where the cosine ends. Default: rollout.max_response_tokens."
        )
        cosine_weight: PositiveFloat = Field(2.0, description="Of the cosine.")
        format_fact: str | None = Field(
            None,
            description="A fact of each response that tells its form, 0 to 1. Default: form pays nothing.",
        )
        format_weight: NonNegativeFloat = Field(1.0, description="Of `format_fact`.")

        def without_effect(self) -> dict[str, str]:
            inert = {} if self.format_fact else {"format_weight": "there is no format_fact"}
            return super().without_effect() | inert

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        o, rewards = self.options, known_rewards(groups)
        right = np.zeros(rewards.shape, bool)
        for row, group in zip(right, groups, strict=True):
            row[: len(group.episodes)] = [solved(one) for one in group.episodes]
        longest = o.cosine_tokens or self.configured.max_response_tokens
        progress = np.minimum(sampled_tokens(groups) / longest, 1.0)
        short, long = (
            np.where(right, o.correct_short, o.wrong_short),
            np.where(right, o.correct_long, o.wrong_long),
        )
        shaped = o.cosine_weight * (long + 0.5 * (short - long) * (1.0 + np.cos(np.pi * progress)))
        if o.format_fact is not None:
            shaped = shaped + o.format_weight * known_facts(groups, o.format_fact, "algorithm.format_fact")
        return standardised(np.ma.masked_where(np.ma.getmaskarray(rewards), shaped))
