"""Rollout groups into groups of scored episodes."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.groups import RolloutGroup


def score_groups(
    groups: Sequence[RolloutGroup], verifier: Verifier, tokenizer: PreTrainedTokenizerBase
) -> list[Group]:
    """Verifies every response's text, special tokens left out, against its prompt's answer."""
    episodes = [
        Episode(
            sequences=(
                TokenSequence.of_response(
                    group.prompt.token_ids, response.token_ids, response.log_probs, response.weight_version
                ),
            ),
            answer=tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=True),
            truncated=response.truncated,
        )
        for group in groups
        for response in group.responses
    ]
    answers = [group.prompt.answer for group in groups for _ in group.responses]
    verified = verifier.verify([(one.answer, gold) for one, gold in zip(episodes, answers, strict=True)])
    scored = iter(map(ScoredEpisode, episodes, verified))
    return [Group(group.prompt.problem, tuple(next(scored) for _ in group.responses)) for group in groups]
