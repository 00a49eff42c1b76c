"""From scored rollout groups to the microbatches of each update, on every rank alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_rapo.config import Algorithm, RunConfig
from megatron_rapo.data.batching import Microbatch, Sample, pack, padded_length, plan_microbatches
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.loss.advantages import ADVANTAGES, overlong_penalty, varies
from megatron_rapo.loss.aggregation import token_weights
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement


def build_minibatches(
    groups: Sequence[Group], config: RunConfig, placement: Placement, vocabulary: int
) -> list[list[Microbatch]]:
    """Minibatches in the groups' order, each as this rank's packed microbatches.

    `vocabulary` is the tokenizer's: a response with another token has no probability, and is masked.

    Every rank holds all groups and plans alike, so advantages, token weights and the number of microbatches
    agree without communication. Only this replica's microbatches, and of them only this context-parallel
    rank's tokens, become tensors.
    """
    size = config.minibatch_prompts
    advantages = batch_advantages(groups, config)
    minibatches = [
        make_samples(groups[start : start + size], advantages[start : start + size], config, vocabulary)
        for start in range(0, len(groups), size)
    ]
    layout = config.parallel
    plans = [
        plan_microbatches(
            [padded_length(len(sample.sequence), config.sequence_multiple) for sample in samples],
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


def batch_advantages(groups: Sequence[Group], config: RunConfig) -> npt.NDArray[np.float64]:
    """`[groups, responses]`, advantages over the whole rollout batch; 0 where the reward is unknown."""
    algorithm, limit = config.algorithm, config.rollout.max_response_tokens
    rewards = known_rewards(groups)
    if np.ma.filled((rewards < 0.0) | (rewards > 1.0), False).any():
        # φ(r) is defined there; the verifiers' rewards are 0 and 1.
        raise ValueError(f"rewards from {rewards.min()} to {rewards.max()} are not all within [0, 1]")
    if algorithm.overlong_buffer_tokens is not None:
        lengths = np.array([[e.episode.sampled_tokens for e in group.episodes] for group in groups])
        rewards = rewards + overlong_penalty(lengths, algorithm.overlong_buffer_tokens, limit)
    return ADVANTAGES[algorithm.advantage](rewards)


def make_samples(
    groups: Sequence[Group],
    advantages: npt.NDArray[np.float64],
    config: RunConfig,
    vocabulary: int,
) -> list[Sample]:
    """The training samples of one minibatch, a sequence each, with token weights over all of it."""
    episodes = [
        (group, number, float(advantages[index, number]))
        for index, group in enumerate(groups)
        for number in range(len(group.episodes))
    ]
    kept = np.array([_in_loss(group, number, config.algorithm, vocabulary) for group, number, _ in episodes])
    lengths = np.array([group.episodes[number].episode.sampled_tokens for group, number, _ in episodes])
    weights = np.zeros(len(episodes))
    if kept.any():
        weights[kept] = token_weights(
            lengths[kept].tolist(), config.algorithm.loss_aggregation, config.rollout.max_response_tokens
        )
    return [
        Sample(
            sequence=sequence,
            reward=group.rewards[number] or 0.0,  # where unknown, the weight is 0
            advantage=advantage,
            token_weight=float(weight),
            has_probability=not sequence.leaves(vocabulary),
        )
        for (group, number, advantage), weight in zip(episodes, weights, strict=True)
        for sequence in group.episodes[number].episode.sequences
    ]


def _in_loss(group: Group, number: int, algorithm: Algorithm, vocabulary: int) -> bool:
    """Whether an episode takes part in the loss."""
    scored = group.episodes[number]
    if scored.episode.leaves(vocabulary) or (algorithm.mask_truncated and scored.episode.truncated):
        return False
    if not scored.verification.outcome.known:
        return False
    rewards = known_rewards([group])
    if algorithm.groups_without_variance == "keep" or varies(rewards)[0]:
        return True
    return algorithm.groups_without_variance == "keep_failed" and bool(rewards.max() == 0.0)


def _common_length(
    minibatches: Sequence[Sequence[Sample]], plans: Sequence[Sequence[Sequence[int]]], config: RunConfig
) -> int | None:
    """What the replica's microbatches are padded to, if pipeline stages exchange their tensors."""
    if config.parallel.pipeline_parallel == 1:
        return None
    return max(
        sum(padded_length(len(samples[index].sequence), config.sequence_multiple) for index in chosen)
        for samples, plan in zip(minibatches, plans, strict=True)
        for chosen in plan
    )
