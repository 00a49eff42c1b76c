"""Supervised fine-tuning: the likelihood of given texts, which RL may start from (a cold start).

    J = E_{(x, y) ∼ data} [ 1/Σ|y| Σ_t log π(y_t | x, y_<t) ]

over the tokens that the assistant says, the one that ends its turn included; prompts, and what templates
write around, are given. Nothing is sampled, so there are no engines but for evaluation, and no rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from megatron_rapo.episode.group import Group
from megatron_rapo.methods.aggregation import Aggregation
from megatron_rapo.methods.demonstrations import Demonstrations, Taught
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import AtToken, Term

if TYPE_CHECKING:
    from torch import Tensor


class LogLikelihood(Term):
    """−log π at each token."""

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `supervised`."""
        return -token.log_prob, {"supervised": -token.log_prob}


class SFT(Method):
    """Cross-entropy on given texts."""

    class Options(Taught):
        """Supervised fine-tuning on texts that the data give."""

        method: str = "sft"
        loss_aggregation: Aggregation = Field(
            "token_mean",
            description="`token_mean`: over all tokens of the minibatch that are learnt; `sequence_mean`: "
            "over each text's tokens, then over texts; `constant`: sum over tokens divided by texts × "
            "max_response_tokens.",
        )

        def without_effect(self) -> dict[str, str]:
            of_samples = ("mask_truncated", "groups_without_variance")
            return super().without_effect() | dict.fromkeys(of_samples, 'method = "sft" samples nothing')

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        if configured.temperature != 1.0:
            raise ValueError(
                f'method = "sft" learns what the policy says at temperature 1, and rollout.temperature is '
                f"{configured.temperature:g}; remove that"
            )

    @property
    def demonstrations(self) -> Demonstrations:
        return self.options.demonstrations

    @property
    def aggregation(self) -> Aggregation:  # type: ignore[override]
        return self.options.loss_aggregation

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return [[0.0] * len(group.episodes) for group in groups]

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, LogLikelihood())]
