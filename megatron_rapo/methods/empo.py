"""EMPO (Entropy Minimized Policy Optimization, arXiv 2504.05812): no gold answers, agreement is the reward.

    r_i = |{j : y_j ≡ y_i}| / G                  the share of the group that answers alike           (eq. 5)
    A_i = (r_i − mean r) / std r
    J = E[ 1/G Σ_i 1/|o_i| Σ_t min(w A_i, clip(w, 1 − ε, 1 + ε) A_i) ]   where δ_low < H < δ_high

H = −Σ p(c) ln p(c) is the entropy of the group's answers c. Groups that agree teach nothing, and those of
answers at random are not trusted. After the abstract, public descriptions and the authors' code
(QingyangZhang/EMPO), whose δ_high is ln G, no two answers being alike, and in which a response without an
answer earns 0. Ours: answers are alike where the verifier reads the same text, where the code asks a verifier
of each pair; groups beyond the bounds are left out of the loss, not only paid alike. A gold answer that data
have is not read; a response whose verification did not end is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.guided import chosen_of
from megatron_rapo.methods.method import OfEpisodes
from megatron_rapo.section import NonNegativeFloat


class EMPO(GRPO):
    """GRPO on how many of a group give the same answer."""

    class Options(GRPO.Options):
        """EMPO (arXiv 2504.05812)."""

        method: str = "empo"
        divergence_coefficient: NonNegativeFloat = Field(
            0.0, description="Of a divergence from the reference; 0: none, and no reference is loaded."
        )
        entropy_low: NonNegativeFloat = Field(
            0.0, description="δ_low in nats: groups of no more are left out."
        )
        entropy_high: NonNegativeFloat | None = Field(
            None, description="δ_high in nats: groups of no less are left out. Default: ln G."
        )

    options: Options

    def teaches(self, group: Group) -> bool:
        """Whether its answers are neither too certain nor too uncertain."""
        answers = Counter(_answers(group))
        shares = np.array(list(answers.values())) / max(answers.total(), 1)
        entropy, high = float(-(shares * np.log(shares)).sum()), self.options.entropy_high
        return (
            self.options.entropy_low < entropy < (math.log(max(answers.total(), 1)) if high is None else high)
        )

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        kept = [[self.teaches(group)] * len(group.episodes) for group in groups]
        return chosen_of(super().choose, groups, kept)

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        shaped = known_rewards(groups)
        for row, group in zip(shaped, groups, strict=True):
            told = _answers(group)
            counts = Counter(told)
            known = [place for place, one in enumerate(group.episodes) if one.reward is not None]
            for place, answer in zip(known, told, strict=True):
                row[place] = counts[answer] / counts.total() if isinstance(answer, str) else 0.0
        return standardised(shaped)


def _answers(group: Group) -> list[str | int]:
    """Of episodes that could be judged; those without an answer are each unlike all others."""
    known = [one.verification.extracted for one in group.episodes if one.reward is not None]
    return [place if answer is None else answer.strip() for place, answer in enumerate(known)]
