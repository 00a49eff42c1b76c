"""The groups that a step trains on: of the prompts drawn, or of those that can teach by comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_rapo.config.sampling import DynamicSampling
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.experience.asking import ask
from megatron_rapo.experience.course import Course
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.methods.method import Method


class Prompts(Protocol):
    """An endless order of prompts (`data.order.PromptOrder`)."""

    @property
    def size(self) -> int:
        """Different prompts that it has."""

    position: int
    """Prompts drawn so far."""

    def draw(self, count: int) -> list[Prompt]:
        """The next `count`."""


@dataclass(frozen=True)
class Batch:
    """What a step trains on, and what was drawn for it.

    Attributes:
        groups: exactly as many as were wanted, in the order drawn.
        sampled: all groups that were sampled; `groups` are of them.
        rounds: of dynamic sampling; 0 without it.
        teaching: how many of `sampled`, and of `groups`, teach; told of dynamic sampling alone.
        first: the draw of the first prompt; the others follow it.
        temperature: that it was sampled at.
    """

    groups: list[Group]
    sampled: Shared
    rounds: int
    teaching: tuple[int, int] = (0, 0)
    first: int = 0
    temperature: float = 1.0

    @property
    def drawn(self) -> list[Group]:
        """All groups that were sampled."""
        return self.sampled.groups

    def metrics(self) -> Mapping[str, float]:
        """What dynamic sampling cost and did: `reward/mean` is of the chosen groups alone."""
        if not self.rounds:
            return {}
        return {
            "sampling/rounds": self.rounds,
            "sampling/prompts_drawn": len(self.drawn),
            "sampling/filled_up": len(self.groups) - self.teaching[1],
            "sampling/surplus": self.teaching[0] - self.teaching[1],
            "sampling/reward_mean_drawn": float(np.ma.filled(known_rewards(self.drawn).mean(), np.nan)),
        }


def collect(prompts: Prompts, wanted: int, method: Method, dynamic: DynamicSampling | None) -> Course[Batch]:
    """The groups of the next `wanted` prompts; with dynamic sampling, of the next that teach.

    Dynamic sampling ends early after `max_rounds`, or once a further round would meet a prompt of this step
    again: what is missing is then filled up with the first groups drawn that do not teach.

    Args:
        prompts: what to draw from. All that is drawn counts as drawn, also groups beyond those wanted.
        wanted: groups of a step.
        method: says what is asked of a prompt (`ask`), and of each group, once, whether it teaches.
        dynamic: how many prompts a round draws, and how many rounds there are; None: one round of `wanted`.
    """
    first = prompts.position
    if dynamic is None:
        sampled = yield from ask(method, prompts.draw(wanted))
        return Batch(sampled.groups, sampled, rounds=0, first=first)
    # A batch may be larger than the set; then it meets prompts again as it would without dynamic sampling.
    most = max(wanted, prompts.size)
    sampled, drawn = Shared(), 0
    teaching: list[bool] = []
    rounds = 0
    while (missing := wanted - sum(teaching)) > 0 and rounds < dynamic.max_rounds and drawn < most:
        count = min(math.ceil(missing * dynamic.over_sampling), most - drawn)
        found = yield from ask(method, prompts.draw(count))
        sampled.extend(found)
        teaching += map(method.teaches, found.groups)
        drawn += count
        rounds += 1
    # The first that are wanted, those that teach before the others; in the order drawn.
    ranked = sorted(range(drawn), key=lambda place: not teaching[place])  # stable
    chosen = sorted(ranked[:wanted])
    counts = sum(teaching), sum(teaching[place] for place in chosen)
    return Batch([sampled.groups[place] for place in chosen], sampled, rounds, counts, first)
