"""ExPO (Self-Explanation Policy Optimization, arXiv 2507.02834): the policy explains answers that it misses.

    J = J_GRPO + β E[ 1/|e| Σ_t log π(e_t | q, e_<t) ],    e ~ π(· | q, a*) where all responses to q are wrong

An explanation of the gold answer a* is likelier under the policy than an expert's, and better than its own
failures: a positive sample of a problem that has none (ExP-GRPO, with its ExP-SFT term). After the abstract
and public descriptions. Ours: the words that ask for it; only explanations that reach a* are learnt; β; each
explanation counts as one response in the mean over responses, of which the divergence is taken as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.guided import all_failed, chosen_of, filled, rewards_of, solved
from megatron_rapo.methods.method import OfEpisodes
from megatron_rapo.methods.terms.likelihood import Likelihood
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import PositiveFloat, PositiveInt


class ExPO(GRPO):
    """GRPO, and the likelihood of the policy's own explanations of answers that it does not find."""

    class Options(GRPO.Options):
        """ExPO (arXiv 2507.02834)."""

        method: str = "expo"
        explanations: PositiveInt = Field(1, description="Explanations that a failed group asks for.")
        explanation_coefficient: PositiveFloat = Field(0.1, description="β: of their likelihood.")
        explain_prompt: str = Field(
            "{question}\nThe answer is {answer}. Explain step by step how to reach it, and end with it.",
            description="Asks for an explanation, by `{question}` and `{answer}`.",
        )

    options: Options

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """G responses; then explanations, where all are wrong."""
        return [self._wanted(group) for group in groups]

    def _wanted(self, group: Group) -> Sequence[Guide]:
        problem, o = group.problem, self.options
        if not group.episodes:
            return [PLAIN] * self.configured.responses_per_prompt
        if group.episodes[-1].guide != PLAIN or not all_failed(group) or not problem.answer:
            return []
        question = filled(o.explain_prompt, question=problem.question, answer=problem.answer)
        return [Guide(question=question, name="explanation")] * o.explanations

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        """The responses, and explanations that are right."""
        plain = chosen_of(
            super().choose, groups, [[one.guide == PLAIN for one in g.episodes] for g in groups]
        )
        return [
            [
                chosen or (one.guide != PLAIN and solved(one))
                for one, chosen in zip(g.episodes, own, strict=True)
            ]
            for g, own in zip(groups, plain, strict=True)
        ]

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(rewards_of(groups, [[one.guide == PLAIN for one in g.episodes] for g in groups]))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        return {"learnt": [[float(one.guide != PLAIN) for one in group.episodes] for group in groups]}

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [*super().terms(), (self.options.explanation_coefficient, Likelihood("learnt"))]
