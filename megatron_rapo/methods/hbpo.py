"""HBPO (Hierarchical Budget Policy Optimization, arXiv 2507.15844): subgroups with budgets of tokens.

    R(n, b) = min( s cos(π n / 2L) − α |n − b|,  s cos(π b / 2L) )   where the response is right, else 0
    A = (R − mean R) / std R  +  mean_b R − s cos(π b / 2L)

for n tokens under the budget b, of G responses in equal subgroups of budgets; mean_b is over the subgroup.
The first part compares all of them, the second the subgroup with what its budget is worth. Each response
begins with words that announce its budget. After the abstract, public descriptions and the authors' code
(ZJU-REAL/HBPO), of which budgets, words, s = 4, α = 1/4096 and L = 4096 are. Ours: the second part counts
once, which the code adds twice; L is the longest response that is allowed; the announcement is given, not
learnt; no divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.episode.guide import Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.guided import solved
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.overlong import sampled_tokens
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import NonNegativeFloat, PositiveFloat, PositiveInt


class HBPO(Method):
    """Clipped policy gradient of rewards that hang on the budget that a response was begun with."""

    class Options(Clipping):
        """HBPO (arXiv 2507.15844)."""

        method: str = "hbpo"
        budgets: list[PositiveInt] = Field(
            [512, 1024, 2048, 2560], min_length=1, description="b: budgets of tokens, of as many subgroups."
        )
        announcement: str = Field(
            "<think> I will answer the question with {budget} tokens",
            description="What a response begins with; it has `{budget}`.",
        )
        scale: PositiveFloat = Field(4.0, description="s: the largest reward.")
        deviation: NonNegativeFloat = Field(1 / 4096, description="α: of each token beside the budget.")

    options: Options
    aggregation = "token_mean"

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        count, kinds = configured.responses_per_prompt, len(options.budgets)
        if count % kinds:
            raise ValueError(
                f"budgets has {kinds}, which does not divide rollout.responses_per_prompt = {count}; name as "
                "many as divide it"
            )
        if "{budget}" not in options.announcement:
            raise ValueError(f"announcement = {options.announcement!r} has no {{budget}}; add it")

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """Each budget for as many responses."""
        o = self.options
        each = self.configured.responses_per_prompt // len(o.budgets)
        begun = [
            Guide(begins=o.announcement.replace("{budget}", str(budget)), name=str(budget))
            for budget in o.budgets
            for _ in range(each)
        ]
        return [[] if group.episodes else begun for group in groups]

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        rewards, budgets = self._rewards(groups)
        found = standardised(rewards)
        for row, own, of_group in zip(found, rewards, budgets, strict=True):
            for budget in np.unique(of_group):
                subgroup = (of_group == budget) & ~np.ma.getmaskarray(own)
                row[subgroup] += own[subgroup].mean() - self._worth(budget) if subgroup.any() else 0.0
        return found

    def _rewards(self, groups: Sequence[Group]) -> tuple[Any, Any]:
        """R, masked where it is unknown, and each response's budget; `[groups, episodes]` both.

        A response that announces no budget earns what its length is worth, and its budget is L, worth 0.
        """
        o, known, tokens = self.options, known_rewards(groups), sampled_tokens(groups)
        budgets = np.full(known.shape, self.configured.max_response_tokens)
        right, announced = np.zeros((2, *known.shape), bool)
        for place, group in enumerate(groups):
            own = slice(len(group.episodes))
            names = [one.guide.name for one in group.episodes]
            budgets[place, own] = [int(name or budgets[place, 0]) for name in names]
            right[place, own] = [solved(one) for one in group.episodes]
            announced[place, own] = list(map(bool, names))
        worth = self._worth(tokens)
        kept = np.minimum(worth - o.deviation * np.abs(tokens - budgets), self._worth(budgets))
        earned = np.where(right, np.where(announced, kept, worth), 0.0)
        return np.ma.masked_where(np.ma.getmaskarray(known), earned), budgets

    def _worth(self, tokens: Any) -> Any:
        """s cos(π n / 2L)."""
        return self.options.scale * np.cos(np.pi * tokens / (2 * self.configured.max_response_tokens))

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
