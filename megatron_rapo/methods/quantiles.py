"""Quantiles of tokens' values, and of rewards from step to step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def quantile(values: Tensor, share: float) -> Tensor:
    """The value at place `share` · (n − 1) of `[n]` in ascending order, rounded to the nearest place.

    n is at least 1. (`torch.quantile` takes at most 16 million values.)
    """
    return values.kthvalue(round(share * (len(values) - 1)) + 1).values


def tracked(quantile: float, share: float, values: list[float], rate: float) -> float:
    """A quantile that is known from earlier steps, moved towards that of a step's values.

    q + rate · (share − the part of the values that are at most q): stochastic approximation, whose rest is
    where that part is `share`.
    """
    return quantile + rate * (share - sum(value <= quantile for value in values) / len(values))
