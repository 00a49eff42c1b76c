"""From scored rollout groups to the microbatches of each update, on every rank alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rapo.config import RunConfig
from megatron_rapo.data.batching import Microbatch, Sample, pack, padded_length, plan_microbatches
from megatron_rapo.loss.advantages import group_advantages
from megatron_rapo.loss.aggregation import token_weights
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.reward.scoring import ScoredGroup


def build_minibatches(
    groups: Sequence[ScoredGroup], config: RunConfig, placement: Placement
) -> list[list[Microbatch]]:
    """Minibatches in the groups' order, each as this rank's packed microbatches.

    Every rank holds all groups and plans alike, so advantages, token weights and the number of microbatches
    agree without communication. Only this replica's microbatches, and of them only this context-parallel
    rank's tokens, become tensors.
    """
    size = config.minibatch_prompts
    minibatches = [
        make_samples(groups[start : start + size], config) for start in range(0, len(groups), size)
    ]
    layout = config.parallel
    plans = [
        plan_microbatches(
            [padded_length(len(sample.token_ids), config.sequence_multiple) for sample in samples],
            replicas=layout.data_parallel,
            token_budget=config.algorithm.max_tokens_per_microbatch,
            count_multiple=layout.pipeline_parallel if layout.virtual_pipeline_parallel else 1,
        )[placement.data_rank]
        for samples in minibatches
    ]
    total_tokens = _common_length(minibatches, plans, config)
    return [
        [
            pack(
                [samples[index] for index in chosen],
                sequence_multiple=config.sequence_multiple,
                total_tokens=total_tokens,
                context_rank=placement.context_rank,
                context_ranks=layout.context_parallel,
                device=device(),
            )
            for chosen in plan
        ]
        for samples, plan in zip(minibatches, plans, strict=True)
    ]


def make_samples(groups: Sequence[ScoredGroup], config: RunConfig) -> list[Sample]:
    """The training samples of one minibatch: advantages over groups, token weights over all of it."""
    rewards = np.array([group.rewards for group in groups])
    advantages = group_advantages(rewards)
    responses = [(group, number) for group in groups for number in range(len(group.responses))]
    weights = token_weights(
        [len(group.responses[number].token_ids) for group, number in responses],
        config.algorithm.loss_aggregation,
        config.rollout.max_response_tokens,
    )
    return [
        Sample(
            token_ids=np.concatenate(
                [np.asarray(group.prompt.token_ids, np.int32), group.responses[number].token_ids]
            ),
            prompt_tokens=len(group.prompt.token_ids),
            engine_log_probs=group.responses[number].log_probs,
            reward=float(reward),
            advantage=float(advantage),
            token_weight=float(weight),
        )
        for (group, number), reward, advantage, weight in zip(
            responses, rewards.flat, advantages.flat, weights, strict=True
        )
    ]


def _common_length(
    minibatches: Sequence[Sequence[Sample]], plans: Sequence[Sequence[Sequence[int]]], config: RunConfig
) -> int | None:
    """What the replica's microbatches are padded to, if pipeline stages exchange their tensors."""
    if config.parallel.pipeline_parallel == 1:
        return None
    return max(
        sum(padded_length(len(samples[index].token_ids), config.sequence_multiple) for index in chosen)
        for samples, plan in zip(minibatches, plans, strict=True)
        for chosen in plan
    )
