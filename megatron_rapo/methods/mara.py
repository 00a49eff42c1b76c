"""MARA ("KL-Regularized RL is Designed to Mode Collapse", arXiv 2510.20817): all good modes alike.

    J = E[ r̄(y) ] − β · KL(π ‖ π_ref)
    r̄(y) = r(z) + β (log π_ref(z) − log π_ref(y))   where r(y) ≥ τ,   r(y) elsewhere
    z = the response with r(z) ≥ τ that the reference finds most probable

The optimum of the KL-regularised objective is π_ref exp(r̄ / β), in which all responses above τ then have
the probability of z: none is rarer because the reference holds it for rare. After the abstract and public
descriptions. Ours: z is of the response's own group; the advantage is GRPO's of r̄, clipped as there; the
KL is the estimate `k3` by default; a response is a sequence of tokens, of whose log-probs sums are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.by_episode import Responses
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.divergences import Divergence
from megatron_rapo.methods.terms.policy_gradient import AdvantageOfMark
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class MARA(Method):
    """Good responses earn the more the less the reference finds them probable, up to the most probable's."""

    class Options(Clipping):
        """MARA (arXiv 2510.20817)."""

        method: str = "mara"
        divergence: Literal["k1", "k2", "k3"] = Field("k3", description="Estimate of KL(policy ‖ reference).")
        beta: PositiveFloat = Field(0.04, description="β, of the divergence and of the augmentation.")
        threshold: float = Field(0.5, allow_inf_nan=False, description="τ: rewards from here are good.")

    options: Options

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """GRPO's, of the rewards as they are; the marks replace them."""
        return standardised(known_rewards(groups))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        self._rewards, self._responses = known_rewards(groups), Responses(groups)
        return self._responses.marks()

    def mark_tokens(self, tokens: Annotated) -> Mapping[str, Tensor]:
        """The advantage of each token's response under r̄."""
        assert tokens.reference_log_probs is not None
        log_probs = self._responses.sums(tokens.reference_log_probs, tokens)
        known = np.ma.masked_where(np.ma.getmaskarray(log_probs), self._rewards)
        good = np.ma.filled(known >= self.options.threshold, False)
        anchor = np.ma.masked_where(~good, log_probs).argmax(axis=1)[:, None]  # 0 where none is good
        of_anchor = np.take_along_axis(known, anchor, 1)
        ahead = np.take_along_axis(log_probs, anchor, 1) - log_probs
        augmented = np.ma.where(good, of_anchor + self.options.beta * ahead, known)
        return {"advantage": self._responses.spread(standardised(augmented), tokens)}

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        surrogate = AdvantageOfMark(o.clip_low, o.clip_high, o.clip_dual)
        return [(1.0, surrogate), (o.beta, Divergence(o.divergence))]
