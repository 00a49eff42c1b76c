"""REX-RAG (Reasoning Exploration with Policy Correction, arXiv 2508.08149): failed responses are continued.

    probe: a wrong response, cut, and an exploratory phrase; the policy goes on from there
    J = E[ 1/Σ|o| Σ_o Σ_t min(v A, clip(v, 1 − ε, 1 + ε) A) ],        v_t = π(o_t) / μ(o_t)
    μ = (1 − α) π_old + α π_probe,     A = (r − mean r) / std r over responses and probes

α is the share of probes in the group. After the phrase the policy is its own probe, so μ = π_old there; a
plain response is none that a probe begins, so μ = (1 − α) π_old. After the abstract, public descriptions and
the authors' code (MiliLab/REX-RAG), which has these two cases, and learns the phrase as well. Ours: what a
probe begins with is given and not learnt; which responses are continued (the first wrong ones), where they
are cut, and the phrases; α by group. In an environment with tools a cut response is the text that is judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from megatron_rapo.episode.brief import BriefEpisode
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.guided import beginning, solved
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.policy_gradient import clipped_surrogate
from megatron_rapo.methods.terms.term import AtToken, Need, Term, present
from megatron_rapo.section import Fraction

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MixtureGradient(Term):
    """−u min(v A, clip(v) A), v = π / μ; the mark `mixture` is log μ − log π_old."""

    clip_low: float
    clip_high: float
    clip_dual: float | None
    needs = frozenset({Need.IMPORTANCE})
    reads = frozenset({"mixture"})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `policy`, and the share of `clipped` tokens."""
        log_ratio = token.log_prob - token.old_log_prob - token.marks["mixture"]
        surrogate = clipped_surrogate(
            log_ratio,
            token.advantage,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            clip_dual=self.clip_dual,
        )
        policy = -present(token.importance) * surrogate.value
        return policy, {"policy": policy, "clipped": surrogate.clipped}


class RexRAG(Method):
    """Clipped policy gradient over responses and probes, with the ratio to their mixture."""

    class Options(Clipping):
        """REX-RAG (arXiv 2508.08149)."""

        method: str = "rex_rag"
        probes: Fraction = Field(
            0.25, description="Of a group's wrong responses, the share that is continued."
        )
        kept: Fraction = Field(
            0.5, description="Of a wrong response, the share of characters that a probe has."
        )
        phrases: list[str] = Field(
            ["\nWait, let me look at this from another angle. ", "\nThis may be wrong; I check each step. "],
            min_length=1,
            description="What is put behind them, in turn.",
        )

    options: Options
    reads_responses = True

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """G responses; then probes of the first that are wrong."""
        return [self._wanted(group) for group in groups]

    def _wanted(self, group: Group) -> Sequence[Guide]:
        o = self.options
        if not group.episodes:
            return [PLAIN] * self.configured.responses_per_prompt
        if group.episodes[-1].guide != PLAIN:
            return []
        wrong = [one.episode for one in group.episodes if one.reward is not None and not solved(one)]
        cut = [beginning(e.answer, o.kept) for e in wrong if not isinstance(e, BriefEpisode)]
        count = math.ceil(o.probes * len(wrong))
        return [
            Guide(begins=text + o.phrases[number % len(o.phrases)], name="probe")
            for number, text in enumerate(cut[:count])
        ]

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        """log(1 − α) of plain responses, 0 of probes."""

        def of_group(group: Group) -> list[float]:
            plain = [one.guide == PLAIN for one in group.episodes]
            return [math.log(sum(plain) / len(plain)) if flag else 0.0 for flag in plain]

        return {"mixture": list(map(of_group, groups))}

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        return [(1.0, MixtureGradient(o.clip_low, o.clip_high, o.clip_dual))]
