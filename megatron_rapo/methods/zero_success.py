"""Learning from groups in which all failed, by penalties that grow with confidence (LENS, arXiv 2510.08696).

    A_i = (r_i − mean r) / std r                                  where a response of the group succeeded
    A_i = −λ · min(c_i / (1 − c_i), c_max)                        where all failed
    c_i = exp(1/|y_i| Σ_t log π_old(y_it)), the geometric mean of the response's token probabilities

A response that failed although the policy was sure of it is pushed down the most; one that it found
improbable hardly. RAPO's flattened reference answers the same question, what a group without success
teaches, in another way. After the abstract and public descriptions. Ours: the form of the penalty, an odds,
which the abstract's likelihood suggests; all of λ and c_max; GRPO's advantages elsewhere; no divergence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.by_episode import Responses
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.overlong import sampled_tokens
from megatron_rapo.methods.terms.policy_gradient import AdvantageOfMark
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class ZeroSuccess(Method):
    """Groups in which all failed push responses down, the more the surer the policy was of them."""

    class Options(Clipping):
        """LENS (arXiv 2510.08696)."""

        method: str = "zero_success"
        penalty: PositiveFloat = Field(0.1, description="λ: of a failed group's penalties.")
        largest_odds: PositiveFloat = Field(10.0, description="c_max: of confidence, as an odds.")

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """GRPO's; the marks replace them where all failed."""
        return standardised(known_rewards(groups))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        rewards, self._responses = known_rewards(groups), Responses(groups)
        self._plain, self._lengths = standardised(rewards), sampled_tokens(groups)
        failed = np.all(np.ma.filled(rewards <= 0.0, True), axis=1, keepdims=True)
        self._failed = failed & ~np.ma.getmaskarray(rewards)
        return self._responses.marks()

    def mark_tokens(self, tokens: Annotated) -> Mapping[str, Tensor]:
        """The advantage of each token's response."""
        log_probs = self._responses.sums(tokens.old_log_probs, tokens)
        confidence = np.exp(log_probs / self._lengths.clip(min=1))
        odds = (confidence / (1.0 - confidence).clip(min=1e-6)).clip(max=self.options.largest_odds)
        penalised = np.where(self._failed, -self.options.penalty * np.ma.filled(odds, 0.0), self._plain)
        return {"advantage": self._responses.spread(penalised, tokens)}

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        return [(1.0, AdvantageOfMark(o.clip_low, o.clip_high, o.clip_dual))]
