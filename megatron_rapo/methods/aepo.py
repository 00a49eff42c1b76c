"""AEPO (Arbitrary Entropy, arXiv 2510.08141): entropy held by samples at another temperature.

    J = J_GRPO(π) + α · E_{o ~ π_old^T, o right}[ Σ_t log π(o_t) ]
    T = T_high where H ≤ H0, else T_low

REINFORCE on right responses draws the policy towards the distribution that they are of: a flatter one than
its own raises the entropy H, a sharper one lowers it, and wrong ones are left out, so that no gradient pulls
the other way. After the abstract and the public code (github.com/597358816/AEPO), of which T_high, T_low and
H0 are; there H is 0 before the first step as well. Ours: of each prompt there are further responses at T,
where the code samples a quarter of the prompts once more and lets a given number of them take others' place
(half as many where H is too high); no ratio and no clip in the second part, which the code has; both parts
are averaged over the same tokens; α.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.guided import chosen_of, rewards_of, solved
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.tempered import Tempered
from megatron_rapo.methods.terms.likelihood import Likelihood
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import PositiveFloat, PositiveInt


class AEPO(Method):
    """Clipped policy gradient, and REINFORCE on right responses at a temperature that holds the entropy."""

    class Options(Tempered):
        """AEPO (arXiv 2510.08141)."""

        method: str = "aepo"
        target_entropy: PositiveFloat = Field(0.5, description="H0, in nats.")
        tempered_responses: PositiveInt = Field(1, description="Further responses to a prompt, at T.")
        reinforce_coefficient: PositiveFloat = Field(1.0, description="α.")

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self.entropy = 0.0  # H, of the last step

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """G responses, and some at T."""
        o = self.options
        temperature = o.against(self.entropy) * self.configured.temperature
        tempered = [Guide(temperature=temperature, name="tempered")] * o.tempered_responses
        wanted = [PLAIN] * self.configured.responses_per_prompt + tempered
        return [[] if group.episodes else wanted for group in groups]

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        """Those at T where they are right."""
        plain = chosen_of(super().choose, groups, _plain(groups))
        return [
            [chosen or self._is_reinforced(one) for chosen, one in zip(own, group.episodes, strict=True)]
            for own, group in zip(plain, groups, strict=True)
        ]

    def _is_reinforced(self, one: ScoredEpisode) -> bool:
        masked = self.options.mask_truncated and one.episode.truncated
        return one.guide != PLAIN and solved(one) and not masked

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(rewards_of(groups, _plain(groups)))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        return {"reinforced": [[float(self._is_reinforced(one)) for one in g.episodes] for g in groups]}

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [
            (1.0, self.options.surrogate()),
            (self.options.reinforce_coefficient, Likelihood("reinforced")),
        ]

    def learn(self, measured: Mapping[str, float]) -> None:
        self.entropy = measured["loss/entropy"]

    def state(self) -> Any:
        return {"entropy": self.entropy}

    def restore(self, state: Any) -> None:
        self.entropy = state["entropy"]


def _plain(groups: Sequence[Group]) -> list[list[bool]]:
    return [[one.guide == PLAIN for one in group.episodes] for group in groups]
