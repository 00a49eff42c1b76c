"""CLPO (Curriculum Learning meets Policy Optimization, arXiv 2509.25004): the policy rewords its problems.

    p = share of the G responses to q that are right
    p ≤ τ_hard: q is simplified;   τ_hard < p ≤ τ_med: q is put in other words;   the answer stays
    J = GRPO's over the responses to q and those to q', each group by itself, − β KL(π ‖ π_ref) of hard q

The policy writes q' itself, and answers it G times more, on-policy. After the abstract and descriptions of
the first version, with τ_hard = 0.3 and τ_med = 0.7. Ours: the words that ask for q'; the form of the
paper's dynamic divergence, which is to keep hard problems near the reference; β; problems that are neither
stay as they are; what the policy says when it rewords is sampled, not learnt (the second version learns it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from megatron_rapo.episode.brief import BriefEpisode
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.guided import chosen_of, filled, rewards_of, success_rate
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.divergences import Divergence
from megatron_rapo.methods.terms.term import AtToken, Term
from megatron_rapo.section import Fraction, NonNegativeFloat

if TYPE_CHECKING:
    from torch import Tensor

_REWORDING = "rewording"


@dataclass(frozen=True)
class DivergenceOfHard(Term):
    """The sampled divergence `k3` from the reference, times the mark `hard`."""

    needs = Divergence("k3").needs
    reads = frozenset({"hard"})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports what `Divergence` does, before the mark."""
        value, reported = Divergence("k3")(token)
        return token.marks["hard"].to(value.dtype) * value, reported


class CLPO(Method):
    """Clipped policy gradient over problems and the policy's own rewordings of them."""

    class Options(Clipping):
        """CLPO (arXiv 2509.25004)."""

        method: str = "clpo"
        hard: Fraction = Field(
            0.3, description="τ_hard: problems of at most this success rate are simplified."
        )
        medium: Fraction = Field(0.7, description="τ_med: others of at most this are put in other words.")
        divergence_coefficient: NonNegativeFloat = Field(
            0.04, description="β, on hard problems; 0: no divergence, and no reference is loaded."
        )
        simplify_prompt: str = Field(
            "Rewrite the problem so that it is easier to understand and its answer stays {answer}. Write the "
            "new problem alone.\n\n{question}",
            description="Asks for a simpler problem, by `{question}` and `{answer}`.",
        )
        reword_prompt: str = Field(
            "Rewrite the problem in other words so that its answer stays {answer}. Write the new problem "
            "alone.\n\n{question}",
            description="Asks for other words, by `{question}` and `{answer}`.",
        )

        def without_effect(self) -> dict[str, str]:
            inert = super().without_effect()
            if self.medium <= self.hard:
                inert |= dict.fromkeys(["medium", "reword_prompt"], "hard is no lower than medium")
            return inert

    options: Options
    aggregation = "sequence_mean"
    reads_responses = True

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """G responses; then a rewording; then G responses to that."""
        return [self._wanted(group) for group in groups]

    def _wanted(self, group: Group) -> Sequence[Guide]:
        o, plain = self.options, [PLAIN] * self.configured.responses_per_prompt
        if not group.episodes:
            return plain
        last, rate = group.episodes[-1], success_rate(group)
        if last.guide == PLAIN and rate <= max(o.hard, o.medium):
            asked = o.simplify_prompt if rate <= o.hard else o.reword_prompt
            texts = {"question": group.problem.question, "answer": group.problem.answer}
            return [Guide(question=filled(asked, **texts), keeps_prompt=True, name=_REWORDING)]
        said = last.episode
        if last.guide.name != _REWORDING or isinstance(said, BriefEpisode) or not said.answer.strip():
            return []
        return [Guide(question=said.answer.strip(), keeps_prompt=True, name="reworded")] * len(plain)

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        return chosen_of(super().choose, groups, _of(groups, "", "reworded"))

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """Over the responses to each wording."""
        found = np.zeros(known_rewards(groups).shape)
        for name in ("", "reworded"):
            found += standardised(rewards_of(groups, _of(groups, name)))
        return found

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        hard = [float(success_rate(group) <= self.options.hard) for group in groups]
        return {"hard": [[flag] * len(group.episodes) for flag, group in zip(hard, groups, strict=True)]}

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        divergence = [(o.divergence_coefficient, DivergenceOfHard())] if o.divergence_coefficient else []
        return [(1.0, o.surrogate()), *divergence]


def _of(groups: Sequence[Group], *names: str) -> list[list[bool]]:
    return [[one.guide.name in names for one in group.episodes] for group in groups]
