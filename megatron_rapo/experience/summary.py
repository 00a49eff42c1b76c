"""What a rollout batch looks like, as metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_rapo.experience.batch import Batch
from megatron_rapo.loss.advantages import varies
from megatron_rapo.reward.outcome import Outcome
from megatron_rapo.reward.scoring import ScoredGroup, known_rewards


def summarise(batch: Batch, vocabulary: int) -> Mapping[str, float]:
    """Rewards, outcomes as shares of all responses, lengths, and how many groups can teach by comparison.

    Of the groups that the step trains on; `sampling/…` tells what was drawn for them. `reward/mean` is of the
    known rewards, NaN where there are none.
    """
    groups = batch.groups
    rewards = known_rewards(groups)
    responses = [response for group in groups for response in group.responses]
    outcomes = Counter(outcome for group in groups for outcome in group.outcomes)
    lengths = np.array([len(response.token_ids) for response in responses])
    return {
        "reward/mean": float(np.ma.filled(rewards.mean(), np.nan)),
        **{f"reward/{outcome}": outcomes[outcome] / len(responses) for outcome in Outcome},
        "reward/unknown": sum(outcomes[outcome] for outcome in Outcome if not outcome.known) / len(responses),
        "reward/groups_all_fail": float(np.ma.filled(rewards.max(axis=1) == 0, False).mean()),
        "reward/groups_without_variance": float((~varies(rewards)).mean()),
        "rollout/response_tokens_mean": float(lengths.mean()),
        "rollout/response_tokens_max": float(lengths.max()),
        "rollout/truncated": sum(response.truncated for response in responses) / len(responses),
        "rollout/weight_version": min(response.weight_version for response in responses),
        "rollout/outside_vocabulary": sum(r.leaves(vocabulary) for r in responses) / len(responses),
        **batch.metrics(),
    }


def count_tokens(groups: Sequence[ScoredGroup]) -> tuple[int, int]:
    """Response tokens, and all tokens that the trainer sees (each response with its prompt)."""
    response = sum(len(response.token_ids) for group in groups for response in group.responses)
    prompt = sum(len(group.prompt.token_ids) * len(group.responses) for group in groups)
    return response, response + prompt
