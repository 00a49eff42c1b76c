"""Rollout groups with the outcomes of their responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.reward.outcome import Outcome, reward_of
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.groups import Response, RolloutGroup


@dataclass(frozen=True)
class ScoredGroup:
    """The responses to one prompt, each with its outcome."""

    prompt: Prompt
    responses: tuple[Response, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def rewards(self) -> list[float]:
        """Reward of each response."""
        return [reward_of(outcome) for outcome in self.outcomes]


def score_groups(
    groups: Sequence[RolloutGroup], verifier: Verifier, tokenizer: PreTrainedTokenizerBase
) -> list[ScoredGroup]:
    """Verifies every response's text, special tokens left out, against its prompt's answer."""
    items = [
        (tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True), group.prompt.answer)
        for group in groups
        for response in group.responses
    ]
    outcomes = iter(verifier.score(items))
    return [
        ScoredGroup(group.prompt, group.responses, tuple(next(outcomes) for _ in group.responses))
        for group in groups
    ]
