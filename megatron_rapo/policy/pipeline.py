"""Microbatches through Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rapo.data.batching import Microbatch
from megatron_rapo.model.branches import Branches, starts_of
from megatron_rapo.model.routing_replay import Packed, Routing

T = TypeVar("T")


def run_forward(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    collect: Callable[[Microbatch, Tensor], T],
    routing: Callable[[Microbatch], Routing | None] = lambda _: None,
) -> list[T]:
    """Runs the model without gradients.

    Args:
        chunks: this rank's model chunks.
        microbatches: the same number on every rank of the replica, of one length where PP > 1.
        collect: called on the last stage with each microbatch and the model's output `[tokens / CP, …]`.
        routing: of a microbatch's rows in this pass, where the model is a mixture of experts.

    Returns:
        What `collect` returned, in order, on the last stage; nothing elsewhere.
    """

    def forward_step(iterator: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        microbatch = next(iterator)
        output = _forward(chunk, microbatch, routing(microbatch))
        return output, lambda tensor, non_loss_data: collect(microbatch, tensor.squeeze(0))

    # no_grad, not inference_mode: Megatron caches the rotary frequencies that it makes here.
    with torch.no_grad():
        return _run(chunks, microbatches, forward_step, forward_only=True)


def run_forward_backward(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    loss: Callable[[Microbatch, Tensor], tuple[Tensor, T]],
) -> list[T]:
    """Runs forward and backward; gradients are summed over microbatches, DP and CP.

    Routers of a mixture take the choices that a microbatch has (`taken_choices`).

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        microbatches: the same number on every rank of the job, of one length where PP > 1.
        loss: called on the last stage with each microbatch and its `[tokens / CP (/ TP), hidden]`; returns
            the microbatch's share of the loss (a sum, already weighted) and what is reported of it.

    Returns:
        The reports, in order, on the last stage; nothing elsewhere.
    """

    def forward_step(iterator: Iterator[Microbatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        microbatch = next(iterator)
        output = _forward(chunk, microbatch, taken_choices(microbatch))

        def reduce(hidden: Tensor) -> tuple[Tensor, Tensor, T]:
            value, report = loss(microbatch, hidden.squeeze(0))
            # The token count is Megatron's normaliser; the loss's weights already are one.
            return value, torch.zeros((), dtype=torch.int, device=value.device), report

        return output, reduce

    return _run(chunks, microbatches, forward_step, forward_only=False)


def taken_choices(microbatch: Microbatch) -> Routing | None:
    """Routers take the choices that the microbatch has; None where it has none."""
    return None if microbatch.experts is None else Routing(microbatch.experts, recorded=False)


def recorded_choices(microbatch: Microbatch) -> Routing:
    """Routers choose, and the microbatch keeps it, of all of this rank's chunks."""
    if microbatch.experts is None:
        microbatch.experts = {}
    return Routing(microbatch.experts, recorded=True)


def _forward(chunk: torch.nn.Module, microbatch: Microbatch, routing: Routing | None) -> Tensor:
    packed: Packed
    if microbatch.tree is None:
        starts = starts_of(microbatch.lengths, microbatch.token_ids.device)
        longest = max(microbatch.lengths)
        packed = Packed(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            cu_seqlens_q_padded=starts,
            cu_seqlens_kv_padded=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            routing=routing,
        )
    else:
        tree = microbatch.tree
        packed = Branches.of(microbatch.lengths, tree.key_lengths, tree.keys, routing)
    return chunk(
        microbatch.token_ids[None],
        microbatch.position_ids[None],
        attention_mask=None,
        packed_seq_params=packed,
    )


def _run(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    forward_step: Callable[..., Any],
    forward_only: bool,
) -> list[Any]:
    iterators = [iter(microbatches) for _ in chunks]
    interleaved = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(microbatches),
        seq_length=sum(microbatches[0].lengths),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
