"""What a rollout batch looks like, as metrics."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np

from megatron_rapo.episode.brief import BriefEpisode
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.episode.guide import PLAIN
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.experience.batch import Batch
from megatron_rapo.methods.advantages import varies


def summarise(batch: Batch, vocabulary: int, sources: Sequence[str] = ()) -> Mapping[str, float]:
    """Rewards, outcomes as shares of all responses, lengths, and how many groups can teach by comparison.

    Of the groups that the step trains on; `sampling/…` and `time/…` tell of all that were drawn. Means of
    rewards are of the known ones, NaN where there are none. What was guided (`Method.ask`) is told apart,
    unless all was.

    Args:
        batch: of the step.
        vocabulary: the tokenizer's size.
        sources: of the training data, by name; where there are several, each has metrics of its own.
    """
    groups, guided = _plain(batch.groups)
    rewards = known_rewards(groups)
    scored = [one for group in groups for one in group.episodes]
    episodes = [one.episode for one in scored]
    outcomes = Counter(one.verification.outcome for one in scored)
    lengths = np.array([episode.sampled_tokens for episode in episodes])
    versions = [sequence.oldest_version for episode in episodes for sequence in episode.sequences]
    return {
        "reward/mean": _mean(rewards),
        **(_by_source(groups, sources) if len(sources) > 1 else {}),
        **{f"reward/{outcome}": outcomes[outcome] / len(episodes) for outcome in Outcome},
        "reward/unknown": sum(outcomes[outcome] for outcome in Outcome if not outcome.known) / len(episodes),
        **_means("reward", [one.verification.facts for one in scored]),
        **_means("environment", [episode.facts for episode in episodes]),
        "reward/groups_all_fail": float(np.ma.filled(rewards.max(axis=1) == 0, False).mean()),
        "reward/groups_without_variance": float((~varies(rewards)).mean()),
        "rollout/response_tokens_mean": float(lengths.mean()),
        "rollout/response_tokens_max": float(lengths.max()),
        "rollout/truncated": sum(episode.truncated for episode in episodes) / len(episodes),
        "rollout/weight_version": float(min((v for v in versions if v is not None), default=math.nan)),
        "rollout/outside_vocabulary": sum(episode.leaves(vocabulary) for episode in episodes) / len(episodes),
        **guided,
        **batch.metrics(),
        **batch.sampled.times.metrics(),
    }


def staleness(batch: Batch, now: int, partial_tokens: int | None = None) -> Mapping[str, float]:
    """How many updates' steps ago what a step trains on was sampled.

    Args:
        batch: of the step.
        now: the version of the weights that it begins with.
        partial_tokens: the option of rollouts; where it is set, shares by staleness are told as well.
    """
    episodes = [one.episode for group in batch.groups for one in group.episodes]
    tokens = _by_staleness(episodes, now)
    if not tokens:
        return {}
    found: dict[str, float] = {
        "rollout/staleness_mean": sum(steps * count for steps, count in tokens.items()) / tokens.total(),
        "rollout/staleness_max": max(tokens),
    }
    if partial_tokens is not None:
        found |= {
            f"rollout/staleness/{steps}": count / tokens.total() for steps, count in sorted(tokens.items())
        }
        by_episode = [_by_staleness([episode], now) for episode in episodes if episode.sampled_tokens]
        found["rollout/carried_over"] = float(np.mean([len(one) > 1 for one in by_episode]))
        beyond = [max(one.values()) > partial_tokens for one in by_episode]
        found["rollout/beyond_partial_tokens"] = float(np.mean(beyond))
    return found


def _by_staleness(episodes: Sequence[Episode | BriefEpisode], now: int) -> Counter[int]:
    """Sampled tokens by the steps that they are older than the policy."""
    found: Counter[int] = Counter()
    for episode in episodes:
        for sequence in episode.sequences:
            for version, count in sequence.by_version:
                found[now - version] += count
    return found


def _plain(groups: Sequence[Group]) -> tuple[Sequence[Group], Mapping[str, float]]:
    """The groups without what was guided, and metrics of that; as they are where all was, or nothing."""
    apart = [[one.guide != PLAIN for one in group.episodes] for group in groups]
    if len({flag for flags in apart for flag in flags}) < 2:
        return groups, {}

    def only(guided: bool) -> list[Group]:
        return [
            replace(group, episodes=tuple(compress(group.episodes, [flag is guided for flag in flags])))
            for group, flags in zip(groups, apart, strict=True)
        ]

    share = float(np.mean([flag for flags in apart for flag in flags]))
    guided_mean = _mean(known_rewards(only(True)))
    return only(False), {"rollout/guided_reward": guided_mean, "rollout/guided": share}


def _mean(rewards: Any) -> float:
    return float(np.ma.filled(rewards.mean(), np.nan))


def _by_source(groups: Sequence[Group], sources: Sequence[str]) -> Mapping[str, float]:
    """Of each source: its responses, and of those the mean reward and the share of unknown ones."""
    metrics: dict[str, float] = {}
    for source in sources:
        own = [group for group in groups if group.problem.source == source]
        responses = sum(len(group.episodes) for group in own)
        metrics[f"reward/{source}/responses"] = responses
        if responses:
            rewards = known_rewards(own)
            metrics[f"reward/{source}/mean"] = _mean(rewards)
            metrics[f"reward/{source}/unknown"] = 1.0 - rewards.count() / responses
    return metrics


def _means(prefix: str, facts: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """What rewards or environments told beside the reward: the mean of each, where it was told."""
    told: defaultdict[str, list[float]] = defaultdict(list)
    for of_episode in facts:
        for name, value in of_episode.items():
            told[name].append(value)
    return {f"{prefix}/{name}": float(np.mean(values)) for name, values in told.items()}


def count_tokens(groups: Sequence[Group]) -> tuple[int, int]:
    """Sampled tokens, and all tokens that the trainer sees (each response with its prompt)."""
    episodes = [one.episode for group in groups for one in group.episodes]
    return sum(one.sampled_tokens for one in episodes), sum(one.tokens for one in episodes)
