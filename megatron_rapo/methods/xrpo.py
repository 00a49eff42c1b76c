"""XRPO (eXplore–eXploit GRPO, arXiv 2510.06672): samples go where they reduce uncertainty the most.

    Π(q) = h(n) − h(n + 1) + λ √(ln(1 + T) / n),     h(n) = t_{1 − δ/2, n − 1} · s / √n
    of n responses to q so far, whose rewards deviate by s, and T to all: after some to each, the rest of the
    budget goes to the largest Π, in rounds
    q never solved: behind problems that were, with the policy's own right responses (seeds)
    A⁺ = A + min( max(ν (η − 1), 0), κ A ) of right responses,   η = exp(mean_j s_j − s_i)

s_i is the response's mean log-prob: a rare right answer counts more. A as in GRPO. After the abstract and
public descriptions. Ours: the form of A⁺, which caps the bonus at a share of A; λ, ν, κ; seeds are the last
that were solved, where the paper looks for similar ones, and are kept in the prompt that is trained under.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
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
from megatron_rapo.section import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt

_REMEMBERED = 64  # solved problems


class XRPO(Method):
    """Clipped policy gradient of groups sized by uncertainty, with rare right responses sharpened."""

    class Options(Clipping):
        """XRPO (arXiv 2510.06672)."""

        method: str = "xrpo"
        base: Fraction = Field(0.5, description="Share of the responses that each prompt has at first.")
        rounds: PositiveInt = Field(2, description="In which the rest of them are spread.")
        confidence: float = Field(0.95, gt=0, lt=1, description="1 − δ: of the interval h.")
        exploration: NonNegativeFloat = Field(0.1, description="λ: of prompts with few responses.")
        seeds: NonNegativeInt = Field(2, description="Solved problems in front of one that was never solved.")
        sharpening: NonNegativeFloat = Field(0.5, description="ν: of rare right responses.")
        largest_bonus: NonNegativeFloat = Field(0.5, description="κ: the bonus is at most this share of A.")

    options: Options
    aggregation = "sequence_mean"
    reads_responses = True

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self._solved: list[list[str]] = []  # question and response

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """Some to each; then the rest by priority, in rounds."""
        count, o = self.configured.responses_per_prompt, self.options
        first, used = max(2, round(count * o.base)), sum(len(group.episodes) for group in groups)
        if not used:
            return [[PLAIN] * min(first, count) for _ in groups]
        left = count * len(groups) - used
        each = math.ceil(max(count - first, 0) * len(groups) / o.rounds)
        shares = self._spread(groups, min(left, each))
        return [[self._guide(group)] * share for group, share in zip(groups, shares, strict=True)]

    def _spread(self, groups: Sequence[Group], budget: int) -> list[int]:
        """How many more responses each prompt gets: one after the other, to the largest Π."""
        from scipy.stats import t as student  # late: it takes a second

        sizes = [len(group.episodes) for group in groups]
        rewards = known_rewards(groups)
        deviations = np.ma.filled(rewards.std(axis=1, ddof=1), 0.0)
        quantile = cache(lambda size: float(student.ppf(0.5 + 0.5 * self.options.confidence, size - 1)))

        def half_width(place: int, size: int) -> float:
            return quantile(size) * deviations[place] / math.sqrt(size)

        def priority(place: int) -> float:
            size = sizes[place]
            gain = half_width(place, size) - half_width(place, size + 1)
            return gain + self.options.exploration * math.sqrt(math.log(1 + sum(sizes)) / size)

        given = [0] * len(groups)
        for _ in range(budget):
            place = max(range(len(groups)), key=priority)
            sizes[place] += 1
            given[place] += 1
        return given

    def _guide(self, group: Group) -> Guide:
        """Behind seeds, where the problem was never solved and there are some."""
        question = group.problem.question
        others = [pair for pair in self._solved if pair[0] != question]
        seeds = others[len(others) - self.options.seeds :] if self.options.seeds else []
        if not seeds or any(map(solved, group.episodes)):
            return PLAIN
        shown = "".join(f"{asked}\n{said}\n\n" for asked, said in seeds)
        return Guide(question=shown + question, keeps_prompt=True, name="seeded")

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """A⁺; and remembers what was solved."""
        o, found = self.options, standardised(known_rewards(groups))
        for row, group in zip(found, groups, strict=True):
            likely = np.array([_mean_log_prob(one) for one in group.episodes])
            rarity = np.exp(np.nanmean(likely) - likely) - 1.0 if np.isfinite(likely).any() else likely
            for place, one in enumerate(group.episodes):
                if solved(one) and row[place] > 0:
                    bonus = max(o.sharpening * float(rarity[place]), 0.0)
                    row[place] += min(bonus, o.largest_bonus * row[place])
        self._remember(groups)
        return found

    def _remember(self, groups: Sequence[Group]) -> None:
        for group in sorted(groups, key=lambda group: group.problem.id):
            right = [one.episode for one in group.episodes if one.guide == PLAIN and solved(one)]
            said = next((one.answer for one in right if not isinstance(one, BriefEpisode)), None)
            if said is not None:
                self._solved.append([group.problem.question, said])
        self._solved = self._solved[-_REMEMBERED:]

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]

    def state(self) -> Any:
        return {"solved": self._solved}

    def restore(self, state: Any) -> None:
        self._solved = [list(pair) for pair in state["solved"]]


def _mean_log_prob(scored: ScoredEpisode) -> float:
    """Of what was sampled, by the engine; NaN where nothing was."""
    if isinstance(scored.episode, BriefEpisode) or not scored.episode.sampled_tokens:
        return math.nan
    sampled = [sequence.log_probs[sequence.sampled] for sequence in scored.episode.sequences]
    return float(np.concatenate(sampled).astype(np.float64).mean())
