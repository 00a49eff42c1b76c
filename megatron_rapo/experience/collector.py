"""Scored groups for prompts: every data-parallel head samples and verifies its share, all ranks get all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from megatron_rapo.config import Rollout
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.reward.scoring import ScoredGroup, score_groups
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.groups import RolloutGroup
from megatron_rapo.rollout.pool import EnginePool

T = TypeVar("T")


class Collector:
    """Asks engines and verifier on heads; the other ranks of a replica receive what their head got."""

    def __init__(
        self,
        rollout: Rollout,
        placement: Placement,
        tokenizer: PreTrainedTokenizerBase,
        pool: EnginePool | None,
        verifier: Verifier | None,
    ) -> None:
        """`pool` and `verifier` are this head's own; None on other ranks."""
        self.rollout = rollout
        self.placement = placement
        self.tokenizer = tokenizer
        self.pool = pool
        self.verifier = verifier

    def sample(
        self, prompts: Sequence[Prompt], *, responses: int, weight_version: int, seed: int
    ) -> list[RolloutGroup]:
        """This head's share of the prompts with their responses; nothing on other ranks.

        Args:
            prompts: the same on all ranks.
            responses: of each prompt.
            weight_version: that must have sampled every token.
            seed: of this batch of samples.
        """
        if self.pool is None:
            return []
        return self.pool.generate(
            prompts[self.placement.data_rank :: self.placement.layout.data_parallel],
            responses_per_prompt=responses,
            max_response_tokens=self.rollout.max_response_tokens,
            temperature=self.rollout.temperature,
            weight_version=weight_version,
            seed=seed,
        )

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """Verifies this head's groups; nothing on other ranks."""
        if self.verifier is None:
            return []
        return score_groups(groups, self.verifier, self.tokenizer)

    def share(self, mine: Sequence[T]) -> list[T]:
        """What all heads made of their shares of the prompts, in the prompts' order, on all ranks."""
        shares = self.placement.share_from_heads(list(mine))
        merged = [None] * sum(len(share) for share in shares)
        for head, share in enumerate(shares):
            merged[head :: len(shares)] = share  # type: ignore[assignment]
        return merged  # type: ignore[return-value]
