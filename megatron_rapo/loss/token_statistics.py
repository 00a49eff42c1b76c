"""Log-prob, entropy and forward KL of vocabulary-parallel logits, with their closed-form gradient.

With π = softmax(z), z = logits / T, over the real vocabulary (padded rows have no probability), y the target,
p = softmax(φ · ℓ) the flattened reference, ℓ = reference logits / T:

    log-prob    log π_y                       ∂/∂z_j = 1[j = y] − π_j
    entropy     H = −Σ π log π                ∂/∂z_j = −π_j (log π_j + H)
    forward KL  Σ p (log p − log π)           ∂/∂z_j = π_j − p_j

(RAPO, arXiv 2510.03865; the flattening per token and its exact normaliser are this package's reading of it,
see docs/architecture.md.) p needs no normalised ℓ: a shift of ℓ cancels in the softmax.

The tensor-parallel group exchanges one maximum and one sum of a few scalars a token. Autograd must not pass
through those reductions (a plain all-reduce under autograd gives silently wrong gradients), hence the
closed form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabularyShard(NamedTuple):
    """Which vocabulary rows this rank's logits are of.

    Attributes:
        start: vocabulary index of the first local column.
        real: local columns that are real tokens; those behind them are padding.
        group: the tensor-parallel group.
    """

    start: int
    real: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, columns: int, vocabulary: int, group: dist.ProcessGroup) -> VocabularyShard:
        """The shard of `columns` logits a rank of `group`, where `vocabulary` tokens are real."""
        start = columns * group.rank()
        return cls(start, min(max(vocabulary - start, 0), columns), group)


class TokenStatistics(NamedTuple):
    """Per token, `[tokens]` fp32 (fp64 for fp64 logits), in nats; the same on all ranks of the group.

    Attributes:
        log_prob: of the target.
        entropy: of the policy.
        forward_kl: of the policy from the flattened reference; None without reference logits.
    """

    log_prob: Tensor
    entropy: Tensor
    forward_kl: Tensor | None


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    shard: VocabularyShard,
    temperature: float,
    reference_logits: Tensor | None = None,
    flattening: Tensor | None = None,
) -> TokenStatistics:
    """Statistics of each token's distribution, differentiable in `logits`.

    Args:
        logits: `[tokens, vocabulary / TP]`, any float type; computed in fp32 (fp64 for fp64).
        targets: `[tokens]` int64, vocabulary indices.
        shard: which rows the columns are.
        temperature: T > 0, divides both logits.
        reference_logits: `[tokens, vocabulary / TP]`, constant.
        flattening: `[tokens]`, φ in [0, 1]; goes with `reference_logits`.
    """
    log_prob, entropy, forward_kl = _TokenStatistics.apply(
        logits, targets, shard, temperature, reference_logits, flattening
    )
    return TokenStatistics(log_prob, entropy, forward_kl if reference_logits is not None else None)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        temperature: float,
        reference_logits: Tensor | None,
        flattening: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = _scaled(logits, shard, temperature)
        powers = None
        if reference_logits is not None and flattening is not None:
            powers = _scaled(reference_logits, shard, temperature) * flattening.to(z.dtype)[:, None]
        maxima = torch.stack([_row_max(x) for x in (z, powers) if x is not None])
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=shard.group)

        z = z - maxima[0][:, None]
        weight = z.exp()
        local, column = _local_target(targets, shard)
        target_z = torch.where(local, _at(z, column), 0.0)
        sums = [weight.sum(-1), (weight * z).sum(-1), target_z]
        if powers is not None:
            powers = powers - maxima[1][:, None]
            mass = powers.exp()
            sums += [mass.sum(-1), (mass * powers).sum(-1), (mass * z).sum(-1)]
        totals = torch.stack(sums)
        dist.all_reduce(totals, group=shard.group)

        normaliser, weighted_z, target_z = totals[:3]
        log_normaliser = normaliser.log()
        log_prob = target_z - log_normaliser
        entropy = log_normaliser - weighted_z / normaliser
        forward_kl = torch.zeros_like(entropy)
        reference_shift = None
        if powers is not None:
            reference_normaliser, weighted_powers, cross_z = totals[3:]
            negative_entropy = weighted_powers / reference_normaliser - reference_normaliser.log()
            forward_kl = negative_entropy - (cross_z / reference_normaliser - log_normaliser)
            reference_shift = maxima[1] + reference_normaliser.log()
        ctx.shard, ctx.temperature = shard, temperature
        ctx.save_for_backward(
            logits,
            targets,
            reference_logits,
            flattening,
            maxima[0] + log_normaliser,
            entropy,
            reference_shift,
        )
        return log_prob, entropy, forward_kl

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, reference_logits, flattening, shift, entropy, reference_shift = ctx.saved_tensors
        shard, temperature = ctx.shard, ctx.temperature
        for_log_prob, for_entropy, for_kl = (g.to(entropy.dtype)[:, None] for g in gradients)

        log_policy = _scaled(logits, shard, temperature) - shift[:, None]
        policy = log_policy.exp()
        # g_lp (1[y] − π) − g_H π (log π + H) + g_KL (π − p), the terms in π together.
        factor = for_kl - for_log_prob - for_entropy * (log_policy + entropy[:, None])
        gradient = policy.mul_(factor)
        if reference_logits is not None:
            powers = _scaled(reference_logits, shard, temperature) * flattening.to(gradient.dtype)[:, None]
            gradient -= for_kl * (powers - reference_shift[:, None]).exp()
        local, column = _local_target(targets, shard)
        if shard.real:
            gradient.scatter_add_(1, column[:, None], torch.where(local[:, None], for_log_prob, 0.0))
        whole = logits.new_zeros(logits.shape)
        whole[:, : shard.real] = gradient / temperature
        return whole, None, None, None, None, None


def _scaled(logits: Tensor, shard: VocabularyShard, temperature: float) -> Tensor:
    """The real columns, in fp32 at least, divided by the temperature."""
    real = logits[:, : shard.real]
    return real.to(torch.promote_types(real.dtype, torch.float32)) / temperature


def _row_max(x: Tensor) -> Tensor:
    # A shard may hold padding alone.
    return x.amax(-1) if x.size(-1) else x.new_full((x.size(0),), -torch.inf)


def _local_target(targets: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Whether each target is one of this rank's columns, and which (0 where it is not)."""
    column = targets - shard.start
    local = (column >= 0) & (column < shard.real)
    return local, torch.where(local, column, 0)


def _at(x: Tensor, column: Tensor) -> Tensor:
    return x.gather(1, column[:, None]).squeeze(1) if x.size(1) else x.new_zeros(x.size(0))
