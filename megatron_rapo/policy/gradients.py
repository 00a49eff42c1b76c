"""A minibatch's gradients, reduced over all ranks, and the wrapping of model chunks that reduces them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from torch import Tensor

from megatron_rapo.config import Optimizer
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.loss.mismatch import Mismatch
from megatron_rapo.loss.objective import HeadStates, Objective
from megatron_rapo.model.build import Body
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.frozen import FrozenModel
from megatron_rapo.policy.hidden_states import shared_tokens
from megatron_rapo.policy.pipeline import run_forward_backward


def wrap(chunks: Sequence[Body], optimizer: Optimizer) -> list[DistributedDataParallel]:
    """Chunks with gradient buffers, which are summed over DP × CP in fp32 at least."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=chunks[0].config.params_dtype is not torch.float64,
        use_distributed_optimizer=optimizer.distributed,
        overlap_grad_reduce=optimizer.overlap_communication,
        overlap_param_gather=optimizer.overlap_communication,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    wrapped[0].config.finalize_model_grads_func = _finalize
    return wrapped


def unwrap(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Lets go of chunks that are done with, and with them of their process groups.

    Hooks of autograd's nodes refer to the chunk that holds the nodes: a circle that Python can't see.
    """
    for chunk in wrapped:
        chunk.grad_accs.clear()


def _finalize(model: Any, num_tokens: Tensor | None = None, **groups: Any) -> None:
    # No token count: the loss's weights have normalised it already.
    finalize_model_grads(model, None, **groups)


def main_gradient(parameter: torch.nn.Parameter) -> Tensor:
    """The reduced gradient of a wrapped chunk's parameter."""
    return parameter.main_grad  # type: ignore[attr-defined]


def accumulate_gradients(
    wrapped: Sequence[DistributedDataParallel],
    minibatch: Sequence[Microbatch],
    objective: Objective,
    frozen: FrozenModel | None,
    placement: Placement,
) -> tuple[Tensor, Mismatch]:
    """Forward and backward of one minibatch into the gradient buffers.

    Args:
        wrapped: this rank's chunks, gradient buffers zeroed.
        minibatch: annotated with what the objective wants.
        objective: the loss.
        frozen: whose whole distribution the objective may want, which annotated it.
        placement: of this rank.

    Returns:
        `[len(objective.parts)]` sums over the minibatch, of which `objective.metrics` makes metrics, and how
        far engine and trainer are apart on it; the same on all ranks.
    """

    def loss(microbatch: Microbatch, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Mismatch]]:
        chosen = microbatch.at_responses(shared_tokens(hidden, placement))
        policy = HeadStates(chosen, wrapped[-1].module.head_weight)
        pull = None
        if frozen is not None and objective.wants_distribution:
            pull = frozen.states(microbatch)
        value, sums, mismatch = objective(microbatch, policy, pull)
        return value, (sums, mismatch)

    reports = run_forward_backward(wrapped, minibatch, loss)
    device = minibatch[0].token_ids.device
    total = torch.zeros(len(objective.parts), dtype=torch.float64, device=device)
    mismatch = Mismatch(device)
    for sums, of_microbatch in reports:
        total += sums
        mismatch.merge(of_microbatch)
    mismatch.reduce(placement)
    return placement.sum_from_last_stage(total), mismatch
