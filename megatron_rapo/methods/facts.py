"""Named numbers that rewards and environments tell of episodes, as methods take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_rapo.episode.group import Group
from megatron_rapo.errors import RapoError


def known_facts(groups: Sequence[Group], name: str, option: str) -> Any:
    """`[groups, episodes]` fp64, a masked array (`numpy.ma`): the fact of episodes whose reward is known.

    Args:
        groups: of a step.
        name: of a fact that the reward tells, or else the environment.
        option: that has the name, for errors.

    Raises:
        RapoError: an episode has no such fact.
    """
    values = np.full((len(groups), max(len(group.episodes) for group in groups)), np.nan)
    for row, group in zip(values, groups, strict=True):
        for number, scored in enumerate(group.episodes):
            facts = {**scored.episode.facts, **scored.verification.facts}
            if scored.reward is None:
                continue
            if name not in facts:
                raise RapoError(
                    f'{option} = "{name}": response {number} to problem {group.problem.id} has no such '
                    f"fact, but {', '.join(facts) or 'none at all'}; name one of them, or have the reward "
                    "tell it"
                )
            row[number] = facts[name]
    return np.ma.masked_invalid(values)
