"""Tokens' weights as a method sees fit once their old log-probs and entropies are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.data.batching import Microbatch
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.method import Method
from megatron_rapo.parallel.placement import Placement


def weigh(minibatches: Sequence[Sequence[Microbatch]], method: Method, placement: Placement) -> None:
    """Gives the tokens of annotated minibatches the weights of `Method.weigh`, where a method has it.

    Weights count on the last pipeline stage alone, so only there the method is asked. All ranks call it.

    Raises:
        RapoError: what it returns are no weights.
    """
    if not (method.weighs and placement.is_last_stage):
        return
    for minibatch in minibatches:
        weights = method.weigh(_annotated(minibatch, placement))
        counts = [int(microbatch.is_response.sum()) for microbatch in minibatch]
        if not isinstance(weights, Tensor) or weights.shape != (sum(counts),):
            raise _wrong(method, weights, f"for {sum(counts)} tokens")
        if not (weights.isfinite() & (weights >= 0)).all():
            raise _wrong(method, weights, "some of which are negative or not finite")
        for microbatch, own in zip(minibatch, weights.split(counts), strict=True):
            microbatch.weights[microbatch.is_response] = own.to(microbatch.weights.dtype)


def _wrong(method: Method, weights: object, what: str) -> RapoError:
    found = f"{tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
    return RapoError(
        f'weigh of method "{method.options.method}" returned {found}, {what}; return a tensor of one weight '
        "of each, from 0 up"
    )


def _annotated(minibatch: Sequence[Microbatch], placement: Placement) -> Annotated:
    def joined(name: str) -> Tensor:
        return torch.cat([getattr(microbatch, name)[microbatch.is_response] for microbatch in minibatch])

    reference = [microbatch.reference_log_probs for microbatch in minibatch]
    known = [values for values in reference if values is not None]
    return Annotated(
        weights=joined("weights"),
        advantages=joined("advantages"),
        phi=joined("phi"),
        positions=joined("response_positions"),
        engine_log_probs=joined("engine_log_probs"),
        old_log_probs=joined("old_log_probs"),
        old_entropies=joined("old_entropies"),
        reference_log_probs=torch.cat(known) if known else None,
        of_all_ranks=lambda values: _gathered(values, placement.gradient_group),
    )


def _gathered(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The values of all ranks, which may have different numbers of them."""
    ranks = group.size()
    length = torch.tensor([len(values)], device=values.device)
    lengths = [torch.empty_like(length) for _ in range(ranks)]
    dist.all_gather(lengths, length, group=group)
    counts = [int(count) for count in lengths]
    padded = values.new_zeros(max(counts))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
