"""A token's probability under each reading of the trainer's logits that an engine may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

# Temperatures looked at, as multiples of the one asked for; 1 is among them.
FACTORS = tuple(2.0 ** (step / 16) for step in range(-24, 25))
TOP_P = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
TOP_K = (1, 5, 10, 20, 40, 50, 100, 200)
MIN_P = (0.01, 0.02, 0.05, 0.1, 0.2)
# Rounding may put a token that top-p left in a little beyond it: a tenth of what is cut off is granted.
SLACK = 0.1


class Readings(NamedTuple):
    """Of response tokens, under the trainer's policy. The temperature is that of the request.

    Attributes:
        scaled: `[tokens, len(FACTORS)]`, log-probs at the temperature times each factor.
        unscaled: `[tokens]`, log-probs at temperature 1.
        over_all_rows: `[tokens]`, log-probs at the temperature with the head's spare rows taken for tokens.
        above: `[tokens]`, probability of all likelier tokens.
        rank: `[tokens]`, how many are likelier.
        share: `[tokens]`, its probability over the likeliest token's.
        kept_by_p, kept_by_k, kept_by_min_p: `[tokens, …]`, the probability that each of TOP_P, TOP_K and
            MIN_P leaves (with SLACK).
    """

    scaled: Array
    unscaled: Array
    over_all_rows: Array
    above: Array
    rank: Array
    share: Array
    kept_by_p: Array
    kept_by_k: Array
    kept_by_min_p: Array

    @classmethod
    def of_columns(cls, columns: Array) -> Self:
        """From `[tokens, COLUMNS]`, as `read` has them."""
        ends = np.cumsum([len(FACTORS), 1, 1, 1, 1, 1, len(TOP_P), len(TOP_K)])
        parts = np.split(columns, ends, axis=1)
        return cls(*(part[:, 0] if 0 < i < 6 else part for i, part in enumerate(parts)))

    @classmethod
    def joined(cls, parts: Sequence[Readings]) -> Self:
        """Those of all tokens of several responses."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


COLUMNS = len(FACTORS) + 5 + len(TOP_P) + len(TOP_K) + len(MIN_P)


def above_with(top_p: float) -> float:
    """Tokens with less probability above them are taken to be left in by `top_p`."""
    return top_p + SLACK * (1 - top_p)


def share_with(min_p: float) -> float:
    """Tokens with a larger share of the likeliest one's probability are taken to be left in by `min_p`."""
    return min_p * (1 - SLACK)


def read(logits: Tensor, targets: Tensor, vocabulary: int, temperature: float) -> Tensor:
    """`[tokens, COLUMNS]` fp64.

    Args:
        logits: `[tokens, rows]` fp32, over all rows of the head that an engine has.
        targets: `[tokens]` int64, each a real token.
        vocabulary: real tokens; rows behind them are spare.
        temperature: of the request.
    """
    at = targets[:, None]
    real = logits[:, :vocabulary]

    def log_prob(scores: Tensor, divisor: float) -> Tensor:
        return (scores.gather(1, at) / divisor - (scores / divisor).logsumexp(1, keepdim=True)).double()

    probs = (real / temperature).softmax(1)
    ordered = probs.sort(1, descending=True).values.double()
    before = ordered.cumsum(1) - ordered
    likelier = real > real.gather(1, at)
    share = ordered / ordered[:, :1]
    return torch.cat(
        [
            *(log_prob(real, temperature * factor) for factor in FACTORS),
            log_prob(real, 1.0),
            log_prob(logits, temperature),
            (probs.double() * likelier).sum(1, keepdim=True),
            likelier.sum(1, keepdim=True).double(),
            probs.gather(1, at).double() / ordered[:, :1],
            *((ordered * (before < above_with(p))).sum(1, keepdim=True) for p in TOP_P),
            *(ordered[:, :k].sum(1, keepdim=True) for k in TOP_K),
            *((ordered * (share > share_with(p))).sum(1, keepdim=True) for p in MIN_P),
        ],
        dim=1,
    )
