"""How much better a response was than the others to the same prompt.

Each estimator takes the rewards of a rollout batch, `[groups, responses]`, at least two responses a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt

Rewards = npt.NDArray[np.float64]
"""`[groups, responses]`; a masked array (`numpy.ma`) where some rewards are unknown."""

Estimator = Callable[[Rewards], Rewards]

# Of the rewards' scale, which is 1 or the largest of them: equal rewards that were summed in another order
# differ by some 1e-16, and the deviation from their mean by as much.
_ROUNDING = 1e-12


def varies(rewards: Rewards) -> npt.NDArray[np.bool_]:
    """`[groups]`: whether known rewards differ by more than rounding, so that comparing them teaches."""
    known = np.ma.asarray(rewards)
    spread = np.ma.filled(known.max(axis=1) - known.min(axis=1), 0.0)
    scale = np.ma.filled(np.ma.abs(known).max(axis=1), 1.0).clip(min=1.0)
    return spread > _ROUNDING * scale


def _of_groups_that_vary(estimator: Callable[[Any], Any]) -> Estimator:
    """Exactly 0 in groups whose rewards are equal but for rounding, and for responses of unknown reward.

    What is left out takes no part in means and deviations, a group's or the batch's.
    """

    @wraps(estimator)
    def advantages(rewards: Rewards) -> Rewards:
        known = np.ma.asarray(rewards, dtype=np.float64)
        found = np.ma.filled(estimator(known), 0.0)
        return np.where(varies(known)[:, None] & ~np.ma.getmaskarray(known), found, 0.0)

    return advantages


def _centred(rewards: Any) -> Any:
    return rewards - rewards.mean(axis=1, keepdims=True)


@_of_groups_that_vary
def standardised(rewards: Any) -> Any:
    """(r − mean) / std over the group (RAPO, arXiv 2510.03865); the sample's std (n − 1), as in TRL."""
    return _centred(rewards) / rewards.std(axis=1, ddof=1, keepdims=True)


@_of_groups_that_vary
def centred(rewards: Any) -> Any:
    """r − mean over the group (arXiv 2503.20783)."""
    return _centred(rewards)


@_of_groups_that_vary
def over_batch_deviation(rewards: Any) -> Any:
    """(r − group mean) / std of all rewards of the batch (arXiv 2508.08221)."""
    return _centred(rewards) / rewards.std(ddof=1)


@_of_groups_that_vary
def leave_one_out(rewards: Any) -> Any:
    """r − mean of the group's other responses (RLOO, arXiv 2402.14740)."""
    responses = rewards.count(axis=1, keepdims=True)
    return _centred(rewards) * responses / np.maximum(responses - 1, 1)


@_of_groups_that_vary
def weighted_by_difficulty(rewards: Any) -> Any:
    """(r − mean) / mean absolute deviation, times the question's weight (arXiv 2601.20614).

    Weights are softmax(−mean r / 2) over the groups that vary, scaled to mean 1, so that they say which
    questions count more, not how fast to learn.
    """
    centred = _centred(rewards)
    deviation = np.ma.abs(centred).mean(axis=1, keepdims=True)
    weights = np.ma.exp(-rewards.mean(axis=1, keepdims=True) / 2.0)
    weights = np.ma.masked_where(~varies(rewards)[:, None], weights)
    return centred / deviation * (weights / weights.mean())
