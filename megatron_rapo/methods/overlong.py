"""DAPO's soft penalty for responses that come near the limit of their length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_rapo.episode.group import Group

# DAPO's rewards are −1 and 1, those here 0 and 1: half as far apart.
_WEIGHT = 0.5


def sampled_tokens(groups: Sequence[Group]) -> npt.NDArray[np.int64]:
    """`[groups, episodes]`: tokens that were sampled; 0 where a group has fewer episodes than the largest."""
    tokens = np.zeros((len(groups), max(len(group.episodes) for group in groups)), np.int64)
    for row, group in zip(tokens, groups, strict=True):
        row[: len(group.episodes)] = [one.episode.sampled_tokens for one in group.episodes]
    return tokens


def overlong_penalty(
    response_tokens: npt.NDArray[np.int64], buffer_tokens: int, max_response_tokens: int
) -> npt.NDArray[np.float64]:
    """DAPO's soft penalty (arXiv 2503.14476, eq. 13) for rewards of 0 and 1: 0 down to −½ over the buffer.

    The paper adds 0 to −1 to rewards of −1 and 1, so at the limit a correct response loses half of what it is
    ahead of a wrong one; so it does here.

    Args:
        response_tokens: any shape.
        buffer_tokens: where the penalty begins, counted from the limit.
        max_response_tokens: the limit.
    """
    over = response_tokens - (max_response_tokens - buffer_tokens)
    return -_WEIGHT * np.clip(over / buffer_tokens, 0.0, 1.0)
