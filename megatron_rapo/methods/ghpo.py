"""GHPO (Guided Hybrid Policy Optimization, arXiv 2507.10628): where all failed, part of the solution helps.

    J = E[ 1/G Σ_i 1/|o_i| Σ_t ( min(w A_i, clip(w, 1 − ε, 1 + ε) A_i) − β KL(π ‖ π_ref) ) ],  o_i ~ π(· | q*)
    q* = q                        if a response to q is right
    q* = q + h_ω                  else: h_ω the first share ω of the solution, ω = 0.25, 0.5, 0.75: the first
                                  of which a response is right
    A_i = (r_i − mean r) / std r  over the responses to q*

all under q*, so that all is on-policy. After the abstract, public descriptions and the authors' code
(hkgc-1/GHPO), of which the words and the shares, in characters, are; a group that fails at every share keeps
the last one there too. Ours: the paper's fixed hint of its first steps is left out. Problems without a
solution keep q.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.guided import beginning, chosen_of, rewards_of, solved, text_of
from megatron_rapo.methods.method import OfEpisodes
from megatron_rapo.section import Fraction


class GHPO(GRPO):
    """GRPO, with the beginning of the solution in the prompts of problems that are too hard without."""

    class Options(GRPO.Options):
        """GHPO (arXiv 2507.10628)."""

        method: str = "ghpo"
        hint_ratios: list[Fraction] = Field(
            [0.25, 0.5, 0.75], min_length=1, description="ω: shares of the solution that are told, in order."
        )
        hint_prompt: str = Field(
            "\n The following text is the beginning part of the answer, which you can refer to for solving "
            "the problem:\n",
            description="Stands between question and hint.",
        )
        solution_field: str = Field("solution", description="Column of problems that has a worked solution.")

    options: Options

    @property
    def columns(self) -> Sequence[str]:
        return [self.options.solution_field]

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """G responses; then as many under the next hint, as long as all fail."""
        return [self._wanted(group) for group in groups]

    def _wanted(self, group: Group) -> Sequence[Guide]:
        count, o = self.configured.responses_per_prompt, self.options
        if not group.episodes:
            return [PLAIN] * count
        asked = len(group.episodes) // count - 1  # hints
        solution = text_of(group.problem, o.solution_field)
        if solution is None or asked == len(o.hint_ratios) or any(map(solved, group.episodes)):
            return []
        ratio = o.hint_ratios[asked]
        question = group.problem.question + o.hint_prompt + beginning(solution, ratio)
        return [Guide(question=question, keeps_prompt=True, name=f"hint of {ratio:g}")] * count

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        """The responses to q*: the last that were asked for."""
        return chosen_of(super().choose, groups, self._last(groups))

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(rewards_of(groups, self._last(groups)))

    def _last(self, groups: Sequence[Group]) -> list[list[bool]]:
        return [[one.guide == group.episodes[-1].guide for one in group.episodes] for group in groups]
