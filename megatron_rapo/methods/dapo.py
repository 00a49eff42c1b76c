"""DAPO (arXiv 2503.14476): decoupled clip and dynamic sampling.

    J = E[ 1/Σ|o_i| Σ_i Σ_t min(w A_i, clip(w, 1 − ε_low, 1 + ε_high) A_i) ]        (eqs. 8 and 12)
    A_i = (r_i − mean r) / std r                                                    (eq. 9)

with no divergence. Overlong responses are filtered (`mask_truncated`, section 3.4) or penalised softly
(`overlong_buffer_tokens`, eq. 13). Dynamic sampling (eq. 11) is an option of the rollouts,
`[rollout.dynamic_sampling]`.

Ours: rewards are 0 and 1, not −1 and 1, so the penalty is half the paper's, which is the same to the
advantages; filtering is the default, and the penalty is off.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.overlong import overlong_penalty, sampled_tokens
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import NonNegativeFloat, PositiveInt


class DAPO(Method):
    """Policy gradient that is clipped higher than lower, over all tokens alike."""

    reward_range = (0.0, 1.0)

    class Options(Clipping):
        """DAPO (arXiv 2503.14476)."""

        method: str = "dapo"
        clip_high: NonNegativeFloat = Field(
            0.28, description="ε_high: the ratio is clipped above at 1 + this."
        )
        mask_truncated: bool = Field(
            True,
            description="Leave responses that were cut at max_response_tokens out of the loss (the paper's "
            "overlong filtering).",
        )
        overlong_buffer_tokens: PositiveInt | None = Field(
            None,
            description="L_cache, the soft overlong penalty: rewards fall linearly by up to ½ over the last "
            "so many tokens before max_response_tokens, at most all of them. (The paper's 1 is of rewards "
            "that are −1 and 1; those here are 0 and 1.) Default: no penalty.",
        )

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        buffer, limit = options.overlong_buffer_tokens, configured.max_response_tokens
        if buffer is not None and buffer > limit:
            raise ValueError(
                f"overlong_buffer_tokens = {buffer} is longer than rollout.max_response_tokens = {limit}: "
                "every response would be penalised; lower it"
            )

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        rewards, buffer = known_rewards(groups), self.options.overlong_buffer_tokens
        if buffer is not None:
            limit = self.configured.max_response_tokens
            rewards = rewards + overlong_penalty(sampled_tokens(groups), buffer, limit)
        return standardised(rewards)

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]
