"""AMPO (Adaptive Multi-Guidance Policy Optimization, arXiv 2510.02227): teachers, where the policy fails.

    all G responses wrong: k of them are replaced by right responses of teachers, those that the policy
    finds the most probable, by exp(1/|y| Σ_t log π_old(y_t | q, y_<t))
    J = E[ 1/G ( Σ_on 1/|o| Σ_t min(w A, clip(w) A) + Σ_off 1/|y| Σ_t f(π(y_t)) A ) ],   f(x) = x / (x + γ)
    A = (r − mean r) / std r over the group as it then is

Teachers' responses are a column of the problem, a list of texts. After the abstract, public descriptions and
the authors' code (SII-Enigma/AMPO). Ours: the policy's probability of the teacher's response itself, where
the paper takes that of the gold answer behind the teacher's reasoning; responses are right by the configured
reward, which judges them at each time; the last k of the group are replaced; k and γ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.by_episode import Responses
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.guided import all_failed, chosen_of, off_policy_marks, rewards_of, solved, texts_of
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.mixed_gradient import MixedGradient
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor


class AMPO(Method):
    """Clipped policy gradient, and a shaped one of teachers' responses where a group fails."""

    class Options(Clipping):
        """AMPO (arXiv 2510.02227)."""

        method: str = "ampo"
        replaced: PositiveInt = Field(1, description="k: responses of a failed group that teachers replace.")
        shaping: PositiveFloat = Field(0.1, description="γ in f(x) = x / (x + γ).")
        teachers_field: str = Field(
            "teacher_responses",
            description="Column of problems that has teachers' responses, a list of texts.",
        )

    options: Options
    aggregation = "sequence_mean"

    @property
    def columns(self) -> Sequence[str]:
        return [self.options.teachers_field]

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """G responses; then all teachers', where all are wrong."""
        return [self._wanted(group) for group in groups]

    def _wanted(self, group: Group) -> Sequence[Guide]:
        if not group.episodes:
            return [PLAIN] * self.configured.responses_per_prompt
        if group.episodes[-1].guide != PLAIN or not all_failed(group):
            return []
        texts = texts_of(group.problem, self.options.teachers_field)
        return [Guide(response=text, name=f"teacher {number}") for number, text in enumerate(texts)]

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        """What is left of the group, and all right teachers, of which `weigh` keeps k."""
        left = [self._mixed(group)[0] for group in groups]
        taught = [[one.guide != PLAIN and solved(one) for one in group.episodes] for group in groups]
        kept = [[a or b for a, b in zip(*pair, strict=True)] for pair in zip(left, taught, strict=True)]
        return chosen_of(super().choose, groups, kept)

    def _mixed(self, group: Group) -> tuple[list[bool], list[int]]:
        """Which of the policy's own responses are left, and the first k right teachers."""
        right = [n for n, one in enumerate(group.episodes) if one.guide != PLAIN and solved(one)]
        own = [n for n, one in enumerate(group.episodes) if one.guide == PLAIN]
        taught = right[: min(self.options.replaced, len(own))]
        left = own[: len(own) - len(taught)]
        return [place in left for place in range(len(group.episodes))], taught

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """Right teachers all have that of the first: which of them are kept plays no part."""
        mixed = [self._mixed(group) for group in groups]
        counted = [[flag or n in taught for n, flag in enumerate(left)] for left, taught in mixed]
        found = standardised(rewards_of(groups, counted))
        for row, group, (_, taught) in zip(found, groups, mixed, strict=True):
            for place, one in enumerate(group.episodes):
                if taught and one.guide != PLAIN and solved(one):
                    row[place] = row[taught[0]]
        return found

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        self._groups, self._responses = groups, Responses(groups)
        return {"off_policy": off_policy_marks(groups), **self._responses.marks()}

    def weigh(self, tokens: Annotated) -> Tensor:
        """Of each group's right teachers, the k that the policy finds most probable."""
        totals = self._responses.sums(tokens.old_log_probs, tokens)
        kept = np.ones(totals.shape)
        for row, keep, group in zip(totals, kept, self._groups, strict=True):
            lengths = [max(one.episode.trained_tokens, 1) for one in group.episodes]
            absent = np.ma.getmaskarray(row)
            taught = [n for n, one in enumerate(group.episodes) if one.guide != PLAIN and not absent[n]]
            means = {n: row[n] / lengths[n] for n in taught}
            ranked = sorted((n for n in taught if solved(group.episodes[n])), key=lambda n: -means[n])
            keep[taught] = 0.0
            keep[ranked[: len(self._mixed(group)[1])]] = 1.0
        weights = tokens.weights.double() * self._responses.spread(kept, tokens).double()
        total = tokens.of_all_ranks(weights.sum().reshape(1)).sum()
        return weights / total if total > 0 else weights

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, MixedGradient(self.options.surrogate(), self.options.shaping))]
