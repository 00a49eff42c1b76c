"""How much better a response was than the others to the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
# DAPO's rewards are −1 and 1, those here 0 and 1: half as far apart.
_OVERLONG_WEIGHT = 0.5


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
def grpo(rewards: Any) -> Any:
    """(r − mean) / std over the group (RAPO, arXiv 2510.03865); the sample's std (n − 1), as in TRL."""
    return _centred(rewards) / rewards.std(axis=1, ddof=1, keepdims=True)


@_of_groups_that_vary
def dr_grpo(rewards: Any) -> Any:
    """r − mean over the group (arXiv 2503.20783)."""
    return _centred(rewards)


@_of_groups_that_vary
def lite_ppo(rewards: Any) -> Any:
    """(r − group mean) / std of all rewards of the batch (arXiv 2508.08221)."""
    return _centred(rewards) / rewards.std(ddof=1)


@_of_groups_that_vary
def leave_one_out(rewards: Any) -> Any:
    """r − mean of the group's other responses (RLOO, arXiv 2402.14740)."""
    responses = rewards.count(axis=1, keepdims=True)
    return _centred(rewards) * responses / np.maximum(responses - 1, 1)


@_of_groups_that_vary
def dgpo(rewards: Any) -> Any:
    """(r − mean) / mean absolute deviation, times the question's weight (arXiv 2601.20614).

    Weights are softmax(−mean r / 2) over the groups that vary, scaled to mean 1, so that they say which
    questions count more, not how fast to learn.
    """
    centred = _centred(rewards)
    deviation = np.ma.abs(centred).mean(axis=1, keepdims=True)
    weights = np.ma.exp(-rewards.mean(axis=1, keepdims=True) / 2.0)
    weights = np.ma.masked_where(~varies(rewards)[:, None], weights)
    return centred / deviation * (weights / weights.mean())


ADVANTAGES: Mapping[str, Estimator] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "lite_ppo": lite_ppo,
    "leave_one_out": leave_one_out,
    "dgpo": dgpo,
}
"""Each takes the rewards of a rollout batch, `[groups, responses]`, at least two responses a group."""


def overlong_penalty(
    response_tokens: npt.NDArray[np.int64], buffer_tokens: int, max_response_tokens: int
) -> Rewards:
    """DAPO's soft penalty (arXiv 2503.14476, eq. 13) for rewards of 0 and 1: 0 down to −½ over the buffer.

    The paper adds 0 to −1 to rewards of −1 and 1, so at the limit a correct response loses half of what it is
    ahead of a wrong one; so it does here.

    Args:
        response_tokens: any shape.
        buffer_tokens: where the penalty begins, counted from the limit.
        max_response_tokens: the limit.
    """
    over = response_tokens - (max_response_tokens - buffer_tokens)
    return -_OVERLONG_WEIGHT * np.clip(over / buffer_tokens, 0.0, 1.0)
