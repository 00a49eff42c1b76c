"""How much better a response was than the others to the same prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

Rewards = npt.NDArray[np.float64]


def _divide(values: Rewards, scale: Rewards) -> Rewards:
    """values / scale, and 0 where the scale is 0: without variance nothing is better than the rest."""
    scale = np.broadcast_to(scale, values.shape)
    return np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)


def _centred(rewards: Rewards) -> Rewards:
    return rewards - rewards.mean(axis=1, keepdims=True)


def grpo(rewards: Rewards) -> Rewards:
    """(r − mean) / std over the group (RAPO, arXiv 2510.03865); the sample's std (n − 1), as in TRL."""
    return _divide(_centred(rewards), rewards.std(axis=1, ddof=1, keepdims=True))


def dr_grpo(rewards: Rewards) -> Rewards:
    """r − mean over the group (arXiv 2503.20783)."""
    return _centred(rewards)


def lite_ppo(rewards: Rewards) -> Rewards:
    """(r − group mean) / std of all rewards of the batch (arXiv 2508.08221)."""
    return _divide(_centred(rewards), np.array(rewards.std(ddof=1)))


def leave_one_out(rewards: Rewards) -> Rewards:
    """r − mean of the group's other responses (RLOO, arXiv 2402.14740)."""
    responses = rewards.shape[1]
    return _centred(rewards) * responses / (responses - 1)


def dgpo(rewards: Rewards) -> Rewards:
    """(r − mean) / mean absolute deviation, times the question's weight (arXiv 2601.20614).

    Weights are softmax(−mean r / 2) over the groups that vary, scaled to mean 1, so that they say which
    questions count more, not how fast to learn.
    """
    centred = _centred(rewards)
    deviation = np.abs(centred).mean(axis=1, keepdims=True)
    varying = deviation > 0
    weights = np.where(varying, np.exp(-rewards.mean(axis=1, keepdims=True) / 2.0), 0.0)
    mean_weight = weights.sum() / max(int(varying.sum()), 1)
    return _divide(centred, deviation) * _divide(weights, np.array(mean_weight))


ADVANTAGES: Mapping[str, Callable[[Rewards], Rewards]] = {
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
    """DAPO's soft penalty (arXiv 2503.14476, eq. 13): 0 down to −1 over the last `buffer_tokens` tokens.

    Args:
        response_tokens: any shape.
        buffer_tokens: where the penalty begins, counted from the limit.
        max_response_tokens: the limit.
    """
    over = response_tokens - (max_response_tokens - buffer_tokens)
    return -np.clip(over / buffer_tokens, 0.0, 1.0)
