"""What methods share that ask more of a problem where its group fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np

from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.episode.guide import PLAIN
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.episode.problem import Problem
from megatron_rapo.methods.method import OfEpisodes

Choose = Callable[[Sequence[Group]], OfEpisodes]


def solved(scored: ScoredEpisode) -> bool:
    """Whether the episode is right, be it of a graded reward (`reward.correct_at`)."""
    return scored.verification.outcome is Outcome.CORRECT


def own(group: Group) -> list[ScoredEpisode]:
    """The episodes of the problem's own prompt."""
    return [one for one in group.episodes if one.guide == PLAIN]


def success_rate(group: Group) -> float:
    """p: the share that is right, of episodes of the problem's own prompt whose reward is known; else 0."""
    known = [solved(one) for one in own(group) if one.reward is not None]
    return sum(known) / max(len(known), 1)


def all_failed(group: Group) -> bool:
    """Whether no episode of the problem's own prompt is right."""
    return not any(map(solved, own(group)))


def text_of(problem: Problem, column: str) -> str | None:
    """A text that the problem's row has; None where it is missing or blank."""
    text = problem.columns.get(column)
    return text if isinstance(text, str) and text.strip() else None


def texts_of(problem: Problem, column: str) -> list[str]:
    """The texts that are not blank of a list that the problem's row has; none where it is missing."""
    texts = problem.columns.get(column)
    return (
        [text for text in texts if isinstance(text, str) and text.strip()] if isinstance(texts, list) else []
    )


def beginning(text: str, share: float) -> str:
    """The first characters of a text, rounded."""
    return text[: round(len(text) * share)]


def chosen_of(choose: Choose, groups: Sequence[Group], flags: Iterable[Sequence[bool]]) -> list[list[bool]]:
    """What a method's `choose` says of the flagged episodes, as if there were no others: those are out."""
    asked = [list(own) for own in flags]
    if not any(map(any, asked)):
        return [[False] * len(own) for own in asked]
    counted = [
        replace(group, episodes=tuple(compress(group.episodes, own)))
        for group, own in zip(groups, asked, strict=True)
    ]
    said = map(iter, choose(counted))
    return [
        [flag and bool(next(of_group)) for flag in own] for own, of_group in zip(asked, said, strict=True)
    ]


def rewards_of(groups: Sequence[Group], chosen: OfEpisodes) -> Any:
    """`known_rewards`, of the chosen episodes alone: the others' are masked, so that none is compared."""
    rewards = known_rewards(groups)
    for row, flags in enumerate(chosen):
        rewards[row, : len(flags)] = np.ma.masked_where(~np.array(flags, bool), rewards[row, : len(flags)])
    return rewards


def filled(template: str, **texts: str) -> str:
    """The template with each `{name}` replaced by its text; other braces, and those in texts, stay."""
    return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), template)


def off_policy_marks(groups: Sequence[Group]) -> list[list[float]]:
    """1 for episodes that were sampled under another prompt, or given; 0 for the others."""
    return [[float(one.guide.is_off_policy) for one in group.episodes] for group in groups]
