"""APO (Adaptive Policy Optimization of A²FM, arXiv 2510.12838): modes, forced and free in one group.

    R = r                       in the cheapest mode, or where the problem is not easy
    R = r · (1 − p^a)           in another mode where it is: p > τ
    R = 0                       of a free response that names no mode

p is the success rate of responses that are forced into the cheapest mode; A as in GRPO, over all of a group.
A response is forced into a mode by the words that it begins with, which are given and not learnt; a free one
chooses its mode by beginning so itself, and learns to choose the cheapest where that is enough. After the
abstract and public descriptions (modes instant, reasoning, agentic; adaptive sampling across modes; a
cost-regularised reward for accuracy and form). Ours: the words; τ, a and how many are forced; responses that
are forced into a dear mode are paid as free ones are; no divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.brief import BriefEpisode
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.guided import solved
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import Fraction, PositiveFloat, PositiveInt


class APO(Method):
    """Clipped policy gradient over forced and free modes; dear ones earn less where the cheapest will do."""

    class Options(Clipping):
        """APO (arXiv 2510.12838)."""

        method: str = "apo"
        modes: list[str] = Field(
            ["<instant>", "<reasoning>", "<agentic>"],
            min_length=2,
            description="What a response begins with in each mode, the cheapest first.",
        )
        forced: PositiveInt = Field(1, description="Responses that are forced into each mode.")
        easy_rate: Fraction = Field(0.75, description="τ: a problem is easy above this rate.")
        power: PositiveFloat = Field(2.0, description="a.")

    options: Options
    reads_responses = True

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        forced, count = options.forced * len(options.modes), configured.responses_per_prompt
        if forced >= count:
            raise ValueError(
                f"forced = {options.forced} of {len(options.modes)} modes leaves none of "
                f"rollout.responses_per_prompt = {count} free; lower it"
            )
        if blank := [mode for mode in options.modes if not mode.strip()]:
            raise ValueError(f"modes has {blank[0]!r}, which no response can be told by; name each mode")

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """Some in each mode, and the rest as the policy likes."""
        o = self.options
        forced = [Guide(begins=mode, name=mode) for mode in o.modes for _ in range(o.forced)]
        wanted = forced + [PLAIN] * (self.configured.responses_per_prompt - len(forced))
        return [[] if group.episodes else wanted for group in groups]

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        rewards = known_rewards(groups)
        for row, group in zip(rewards, groups, strict=True):
            row[: len(group.episodes)] *= self._worth(group)
        return standardised(rewards)

    def _worth(self, group: Group) -> Any:
        """What multiplies each reward."""
        o = self.options
        modes = [self._mode(one) for one in group.episodes]
        tries = [one for one in group.episodes if one.guide.name == o.modes[0] and one.reward is not None]
        p = sum(map(solved, tries)) / max(len(tries), 1)
        dear = 1.0 - p**o.power if p > o.easy_rate else 1.0
        return np.array([0.0 if mode is None else dear if mode else 1.0 for mode in modes])

    def _mode(self, one: ScoredEpisode) -> int | None:
        """Its number; None where the response names none."""
        said = "" if isinstance(one.episode, BriefEpisode) else one.episode.answer.lstrip()
        text = one.guide.name or said
        return next((n for n, mode in enumerate(self.options.modes) if text.startswith(mode)), None)

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
