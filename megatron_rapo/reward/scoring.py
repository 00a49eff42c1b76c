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
    """Judges every response's text, special tokens left out."""
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
    problems = [group.prompt.problem for group in groups]
    asked = [problem for problem, group in zip(problems, groups, strict=True) for _ in group.responses]
    verified = verifier.verify([(one.answer, problem) for one, problem in zip(episodes, asked, strict=True)])
    scored = iter(map(ScoredEpisode, episodes, verified))
    return [
        Group(problem, tuple(next(scored) for _ in group.responses))
        for problem, group in zip(problems, groups, strict=True)
    ]
