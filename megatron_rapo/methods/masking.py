"""Weights of a minibatch's tokens of which a method leaves some out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_rapo.methods.annotated import Annotated

if TYPE_CHECKING:
    from torch import Tensor


def masked(tokens: Annotated, kept: Tensor) -> Tensor:
    """The weights of the tokens that are kept, which add up to what all did; one at least must be.

    Args:
        tokens: of this rank.
        kept: bool, `[tokens]`.
    """
    import torch  # late: options are read without it

    left = tokens.weights * kept
    sums = [part.double().sum() for part in (tokens.weights, left)]  # fp32's depend on who has which
    totals = tokens.of_all_ranks(torch.stack(sums)).reshape(-1, 2).sum(0)
    return left * (totals[0] / totals[1])
