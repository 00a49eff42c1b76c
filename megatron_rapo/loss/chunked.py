"""From final hidden states to loss and gradients, in chunks of tokens: no full logits tensor ever exists.

Per chunk: one head GEMM makes logits (another the reference's), the statistics are exchanged over tensor
parallelism, the per-token loss and its derivatives by the statistics are taken, the logits become their
gradient in place, and two GEMMs make of it the hidden states' and the head's gradients. So the gradient is
made in the forward, with no GEMM more than a backward through full logits takes; the backward only scales it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rapo.loss.rows import Pull
from megatron_rapo.loss.statistics import ChunkDistribution, TokenStatistics, Upstream
from megatron_rapo.loss.vocabulary import VocabularyShard

# Of a chunk's statistics and rows, each token's share of the loss, `[rows]`.
TokenLoss = Callable[[TokenStatistics, slice], Tensor]


@dataclass(frozen=True)
class Head:
    """A vocabulary-parallel head and how its logits are read.

    Attributes:
        weight: `[vocabulary / TP, hidden]`.
        shard: which rows of the vocabulary these are.
        temperature: T, divides logits.
        chunk_tokens: tokens whose logits exist at a time.
    """

    weight: Tensor
    shard: VocabularyShard
    temperature: float
    chunk_tokens: int

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Slices of at most `chunk_tokens`."""
        for start in range(0, tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, tokens))


@dataclass(frozen=True)
class ReferenceStates:
    """The reference at the same tokens.

    Attributes:
        hidden: `[tokens, hidden]`, final hidden states.
        weight: `[vocabulary / TP, hidden]`, its frozen head.
        flattening: `[tokens]`, φ.
        forward, reverse: which divergences are wanted.
        mixture: β of the Jensen–Shannon divergence; None: it is not wanted.
    """

    hidden: Tensor
    weight: Tensor
    flattening: Tensor
    forward: bool
    reverse: bool
    mixture: float | None = None

    def pull(self, rows: slice) -> Pull:
        """The reference's logits of some tokens."""
        logits = self.hidden[rows] @ self.weight.T
        return Pull(logits, self.flattening[rows], self.forward, self.reverse, self.mixture)


@torch.no_grad()
def chunked_statistics(
    hidden: Tensor, targets: Tensor, head: Head, reference: ReferenceStates | None = None
) -> TokenStatistics:
    """Statistics of each token, without gradients.

    Args:
        hidden: `[tokens, hidden]`.
        targets: `[tokens]` int64.
        head: the head; of the reference's states too.
        reference: for the divergences and the reference's log-probs.
    """
    parts = [
        _distribution(hidden[rows], targets[rows], head, reference, rows).statistics
        for rows in head.chunks(len(targets))
    ]
    if not parts:
        return TokenStatistics._make(
            hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
            for _ in TokenStatistics._fields
        )
    return TokenStatistics._make(
        None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)
    )


def chunked_loss(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    token_loss: TokenLoss,
    reference: ReferenceStates | None = None,
) -> Tensor:
    """Σ token_loss, differentiable in `hidden`, and in `head.weight` unless it is frozen.

    Under tensor parallelism the gradient in `hidden` is this rank's part of a sum over the group.

    Args:
        hidden: `[tokens, hidden]`.
        targets: `[tokens]` int64.
        head: the head.
        token_loss: called once a chunk, with autograd; what it returns may depend on the statistics of the
            same token only.
        reference: for the divergences.
    """
    return _ChunkedLoss.apply(hidden, head.weight, targets, head, token_loss, reference)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        head: Head,
        token_loss: TokenLoss,
        reference: ReferenceStates | None,
    ) -> Tensor:
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=accumulator, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        # Summed over chunks, so in fp32 at least; none of a frozen head.
        weight_gradient = torch.zeros_like(weight, dtype=accumulator) if weight.requires_grad else None
        for rows in head.chunks(len(targets)):
            chunk = _distribution(hidden[rows], targets[rows], head, reference, rows)
            value, upstream = _differentiate(token_loss, chunk.statistics, rows)
            loss += value
            gradient = chunk.gradient(upstream)
            torch.mm(gradient, weight, out=hidden_gradient[rows])
            if weight_gradient is None:
                pass
            elif hidden.dtype is accumulator:
                weight_gradient.addmm_(gradient.T, hidden[rows])
            else:
                weight_gradient += gradient.T @ hidden[rows]
            del chunk, gradient  # before the next chunk's logits are made
        ctx.gradients = hidden_gradient, weight_gradient
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss hands its gradient out once; compute it again for another backward")
        (hidden_gradient, weight_gradient), ctx.gradients = ctx.gradients, None
        # In place: a copy of the head's gradient would be as large as the head.
        scale = upstream[0]
        of_weight = None if weight_gradient is None else weight_gradient.mul_(scale)
        return hidden_gradient.mul_(scale), of_weight, None, None, None, None


def _distribution(
    hidden: Tensor, targets: Tensor, head: Head, reference: ReferenceStates | None, rows: slice
) -> ChunkDistribution:
    return ChunkDistribution(
        hidden @ head.weight.T,
        targets,
        head.shard,
        head.temperature,
        None if reference is None else reference.pull(rows),
    )


def _differentiate(
    token_loss: TokenLoss, statistics: TokenStatistics, rows: slice
) -> tuple[Tensor, Upstream]:
    """The chunk's loss, and its derivative by each statistic."""
    with torch.enable_grad():
        leaves = {
            name: value.detach().requires_grad_()
            for name in Upstream._fields
            if (value := getattr(statistics, name)) is not None
        }
        value = token_loss(statistics._replace(**leaves), rows).sum()
        derivatives = torch.autograd.grad(
            value, list(leaves.values()), allow_unused=True, materialize_grads=False
        )
    found = dict(zip(leaves, derivatives, strict=True))
    zero = torch.zeros_like(statistics.log_prob)
    for name in ("log_prob", "entropy"):
        found[name] = zero if found[name] is None else found[name]
    return value.detach(), Upstream._make(found.get(name) for name in Upstream._fields)
