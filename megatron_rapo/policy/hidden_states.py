"""From what the last stage's layers leave to the tokens that the head needs on every TP rank."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_rapo.parallel.placement import Placement


def shared_tokens(hidden: Tensor, placement: Placement) -> Tensor:
    """`[tokens / CP, hidden]`, the same on all TP ranks; the backward sums each rank's part of the gradient.

    Args:
        hidden: `[tokens / CP, hidden]`, or under sequence parallelism `[tokens / CP / TP, hidden]`.
        placement: whose layout says which.
    """
    if placement.layout.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=placement.tensor_group)
    return copy_to_tensor_model_parallel_region(hidden, group=placement.tensor_group)


@torch.no_grad()
def whole_tokens(hidden: Tensor, placement: Placement) -> Tensor:
    """The same, without gradients."""
    return shared_tokens(hidden, placement)
