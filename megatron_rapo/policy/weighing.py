"""What a method makes of tokens, once their log-probs and entropies are known: their weights, and marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.data.batching import Microbatch
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.statistics import TokenStatistics
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
        weights = method.weigh(_annotated(minibatch, method, placement))
        _check(weights, minibatch, f'weigh of method "{method.options.method}"', "weight", from_0=True)
        for microbatch, own in _split(weights, minibatch):
            microbatch.weights[microbatch.is_response] = own.to(microbatch.weights.dtype)


def mark(
    minibatch: Sequence[Microbatch],
    method: Method,
    placement: Placement,
    now: Sequence[TokenStatistics] | None = None,
) -> None:
    """Gives the tokens of an annotated minibatch the marks of `Method.mark_tokens`, where a method has it.

    Before each update, on the last pipeline stage alone.

    Args:
        minibatch: this rank's microbatches.
        method: makes the marks.
        placement: this rank's.
        now: of each microbatch's tokens under the policy as it is; None: it has not moved in this step, or
            the method does not ask.

    Raises:
        RapoError: what it returns are no marks.
    """
    if not (method.marks_tokens and placement.is_last_stage):
        return
    marks = method.mark_tokens(_annotated(minibatch, method, placement, now))
    for name, values in marks.items():
        _check(values, minibatch, f'mark_tokens of method "{method.options.method}", {name!r}', "number")
        for microbatch, own in _split(values, minibatch):
            whole = torch.zeros_like(microbatch.weights)
            whole[microbatch.is_response] = own.to(whole.dtype)
            microbatch.marks[name] = whole


def _check(
    values: object, minibatch: Sequence[Microbatch], what: str, wanted: str, from_0: bool = False
) -> None:
    count = sum(int(microbatch.is_response.sum()) for microbatch in minibatch)
    found = f"{tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    wrong = ""
    if not isinstance(values, Tensor) or values.shape != (count,):
        wrong = f"for {count} tokens"
    elif not values.isfinite().all() or (from_0 and not (values >= 0).all()):
        wrong = f"some of which are {'negative or ' if from_0 else ''}not finite"
    if wrong:
        bound = ", from 0 up" if from_0 else ", finite"
        raise RapoError(f"{what} returned {found}, {wrong}; return a tensor of one {wanted} of each{bound}")


def _split(values: Tensor, minibatch: Sequence[Microbatch]) -> Iterator[tuple[Microbatch, Tensor]]:
    """Each microbatch, with the values of its response tokens."""
    counts = [int(microbatch.is_response.sum()) for microbatch in minibatch]
    return zip(minibatch, values.split(counts), strict=True)


def _annotated(
    minibatch: Sequence[Microbatch],
    method: Method,
    placement: Placement,
    now: Sequence[TokenStatistics] | None = None,
) -> Annotated:
    chosen = [microbatch.is_response for microbatch in minibatch]

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([own[where] for own, where in zip(values, chosen, strict=True)])

    def field(name: str) -> Tensor:
        return joined([getattr(microbatch, name) for microbatch in minibatch])

    reference = [microbatch.reference_log_probs for microbatch in minibatch]
    known = [values for values in reference if values is not None]
    old_log_probs, old_entropies = field("old_log_probs"), field("old_entropies")
    return Annotated(
        weights=field("weights"),
        advantages=field("advantages"),
        phi=field("phi"),
        positions=field("response_positions"),
        engine_log_probs=field("engine_log_probs"),
        old_log_probs=old_log_probs,
        old_entropies=old_entropies,
        tempered_log_probs=None if method.tempered is None else field("tempered_log_probs"),
        reference_log_probs=torch.cat(known) if known else None,
        marks={
            name: joined([microbatch.marks[name] for microbatch in minibatch]) for name in minibatch[0].marks
        },
        log_probs=old_log_probs if now is None else joined([each.log_prob for each in now]),
        entropies=old_entropies if now is None else joined([each.entropy for each in now]),
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
