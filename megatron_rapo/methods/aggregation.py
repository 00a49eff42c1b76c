"""How per-token losses become one number: the weight of a response's tokens in the minibatch's sum.

Weights are made of the whole minibatch before it is split over ranks and microbatches, so the loss is one
plain sum, and its value cannot depend on TP, PP, VPP, CP, DP, packing or order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def token_weights(
    response_tokens: Sequence[int], aggregation: Aggregation, max_response_tokens: int
) -> npt.NDArray[np.float64]:
    """The weight of each token of each response.

    Args:
        response_tokens: tokens of every response of the minibatch.
        aggregation: `token_mean`: 1 / all tokens; `sequence_mean`: 1 / (responses × own tokens), as GRPO;
            `constant`: 1 / (responses × max_response_tokens), as Dr. GRPO (arXiv 2503.20783).

    Returns:
        `[responses]`.
    """
    tokens = np.asarray(response_tokens, dtype=np.float64).clip(min=1.0)  # an empty one has none to weigh
    if aggregation == "token_mean":
        return np.full_like(tokens, 1.0 / max(sum(response_tokens), 1))
    if aggregation == "sequence_mean":
        return 1.0 / (len(tokens) * tokens)
    return np.full_like(tokens, 1.0 / (len(tokens) * max_response_tokens))
