"""Rollout groups with the outcomes of their responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.reward.outcome import Outcome, reward_of
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.groups import Response, RolloutGroup


@dataclass(frozen=True)
class ScoredGroup:
    """The responses to one prompt, each with its outcome.

    Attributes:
        why_unknown: what happened to the first response whose reward is unknown; None where all are known.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    outcomes: tuple[Outcome, ...]
    why_unknown: str | None = None

    @property
    def rewards(self) -> list[float | None]:
        """Reward of each response; None where it is unknown."""
        return [reward_of(outcome) for outcome in self.outcomes]


def known_rewards(groups: Sequence[ScoredGroup]) -> Any:
    """`[groups, responses]` fp64, a masked array (`numpy.ma`): unknown rewards are masked."""
    values = [[np.nan if reward is None else reward for reward in group.rewards] for group in groups]
    return np.ma.masked_invalid(np.array(values, dtype=np.float64))


def score_groups(
    groups: Sequence[RolloutGroup], verifier: Verifier, tokenizer: PreTrainedTokenizerBase
) -> list[ScoredGroup]:
    """Verifies every response's text, special tokens left out, against its prompt's answer."""
    items = [
        (tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True), group.prompt.answer)
        for group in groups
        for response in group.responses
    ]
    verifications = iter(verifier.verify(items))
    scored = []
    for group in groups:
        found = [next(verifications) for _ in group.responses]
        scored.append(
            ScoredGroup(
                group.prompt,
                group.responses,
                tuple(verification.outcome for verification in found),
                next((f"{one.outcome}: {one.why}" for one in found if not one.outcome.known), None),
            )
        )
    return scored
