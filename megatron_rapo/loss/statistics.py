"""Per-token statistics of vocabulary-parallel distributions, and their closed-form gradient.

With π = softmax(z), z = logits / T, over the real vocabulary, y the target, p = softmax(φ ℓ) the flattened
reference, q = softmax(ℓ) the reference, ℓ = its logits / T:

    log-prob    log π_y                       ∂/∂z_j = 1[j = y] − π_j
    entropy     H = −Σ π log π                ∂/∂z_j = −π_j (log π_j + H)
    forward KL  F = Σ p (log p − log π)       ∂/∂z_j = π_j − p_j
    reverse KL  R = Σ π (log π − log q)       ∂/∂z_j = π_j (log π_j − log q_j − R)
    JS          J = (1 − β) K + β Σ q (log q − log M)
                                              ∂/∂z_j = (1 − β) π_j (log π_j − log M_j − K)
                with M = (1 − β) π + β q, K = Σ π (log π − log M)

(The objective is RAPO's, arXiv 2510.03865; the flattening per token with its exact normaliser is this
package's reading of it. J is the generalised Jensen–Shannon divergence of arXiv 2306.13649, eq. 2.) p needs
no normalised ℓ: a shift of ℓ cancels in the softmax.

The tensor-parallel group exchanges one maximum and one sum of a few scalars a token, and for J, which needs
both distributions normalised first, another sum of two. Autograd must not pass
through those reductions (a plain all-reduce under autograd gives silently wrong gradients), hence the closed
form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.loss.kernels import mixture_sums, row_sums, write_gradient
from megatron_rapo.loss.rows import GradientTerms, Pull, RowSums
from megatron_rapo.loss.vocabulary import VocabularyShard


class TokenStatistics(NamedTuple):
    """Per token, `[tokens]`, fp32 at least, in nats; the same on all ranks of the group.

    Attributes:
        log_prob: log π of the target.
        entropy: H.
        forward_kl: F, or None.
        reverse_kl: R, or None.
        jensen_shannon: J, or None.
        flattened_log_prob: log p of the target, or None; constant.
        reference_log_prob: log q of the target, or None; constant.
    """

    log_prob: Tensor
    entropy: Tensor
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    jensen_shannon: Tensor | None = None
    flattened_log_prob: Tensor | None = None
    reference_log_prob: Tensor | None = None


class Upstream(NamedTuple):
    """The loss's derivative by each statistic, `[tokens]`; None where it has none."""

    log_prob: Tensor
    entropy: Tensor
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    jensen_shannon: Tensor | None = None


class ChunkDistribution:
    """A chunk of tokens' logits, which become their gradient in place."""

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        shard: VocabularyShard,
        temperature: float,
        pull: Pull | None = None,
    ) -> None:
        """
        Args:
            logits: `[tokens, vocabulary / TP]`, any float type; `gradient` overwrites them.
            targets: `[tokens]` int64, vocabulary indices.
            shard: which rows of the vocabulary the columns are.
            temperature: T > 0.
            pull: the reference's logits, of the same shape.
        """
        self._logits = logits
        self._real = logits[:, : shard.real]
        self._targets = targets
        self._shard = shard
        self._temperature = temperature
        self._pull = None if pull is None else pull._replace(logits=pull.logits[:, : shard.real])
        self._sums, target_z, target_reference = self._exchange()
        self.statistics = self._make_statistics(target_z, target_reference)
        if self._pull is not None and self._pull.mixture is not None:
            self._mix(self._pull, self._pull.mixture)

    def _exchange(self) -> tuple[RowSums, Tensor, Tensor]:
        """Sums over the whole vocabulary, relative to its maxima; the targets' z and ℓ."""
        local = row_sums(self._real, self._temperature, self._pull)
        shard, dtype = self._shard, local.total.dtype
        names = [
            n for n in ("maximum", "powers_maximum", "reference_maximum") if getattr(local, n) is not None
        ]
        maxima = torch.stack([getattr(local, name) for name in names])
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=shard.group)
        shifted = _relative_to(local, RowSums(**{**local._asdict(), **dict(zip(names, maxima, strict=True))}))

        mine, column = shard.local_column(self._targets)
        own = [self._real] if self._pull is None else [self._real, self._pull.logits]
        at_target = [torch.where(mine, _at(x, column).to(dtype) / self._temperature, 0.0) for x in own]
        summed = [n for n in RowSums._fields if not n.endswith("maximum") and getattr(shifted, n) is not None]
        totals = torch.stack([*(getattr(shifted, name) for name in summed), *at_target])
        dist.all_reduce(totals, group=shard.group)
        sums = shifted._replace(**dict(zip(summed, totals, strict=False)))
        return sums, totals[len(summed)], totals[-1]

    def _make_statistics(self, target_z: Tensor, target_reference: Tensor) -> TokenStatistics:
        s, pull = self._sums, self._pull
        log_total = s.total.log()
        statistics = TokenStatistics(
            log_prob=target_z - s.maximum - log_total, entropy=log_total - s.weighted / s.total
        )
        if pull is not None and pull.forward:
            assert s.mass is not None and s.mass_powers is not None
            assert s.mass_logits is not None and s.powers_maximum is not None
            log_mass = s.mass.log()
            forward = s.mass_powers / s.mass - log_mass - s.mass_logits / s.mass + log_total
            power = pull.flattening.to(log_mass.dtype) * target_reference
            statistics = statistics._replace(
                forward_kl=forward, flattened_log_prob=power - s.powers_maximum - log_mass
            )
        if pull is not None and pull.normalises:
            assert s.reference_total is not None and s.cross is not None and s.reference_maximum is not None
            log_reference = s.reference_total.log()
            reverse = log_reference - statistics.entropy - s.cross / s.total
            statistics = statistics._replace(
                reverse_kl=reverse,
                reference_log_prob=target_reference - s.reference_maximum - log_reference,
            )
        return statistics

    def _mix(self, pull: Pull, share: float) -> None:
        """Adds J to the statistics; keeps K for the gradient."""
        local = mixture_sums(self._real, self._temperature, pull, self._sums)
        both = torch.stack(local)
        dist.all_reduce(both, group=self._shard.group)
        self._policy_from_mixture, reference = both
        divergence = (1.0 - share) * self._policy_from_mixture + share * reference
        self.statistics = self.statistics._replace(jensen_shannon=divergence)

    def gradient(self, upstream: Upstream) -> Tensor:
        """The loss's gradient in the logits, `[tokens, vocabulary / TP]`, written over them."""
        s, statistics = self._sums, self.statistics
        log_total, one_over = s.total.log(), 1.0 / s.total
        for_log_prob, for_entropy = upstream.log_prob, upstream.entropy
        constant = -for_log_prob - for_entropy * (statistics.entropy - log_total)
        slope = -for_entropy
        terms = GradientTerms(s.maximum, constant, slope)
        if upstream.forward_kl is not None:
            assert s.mass is not None
            constant = constant + upstream.forward_kl
            terms = terms._replace(powers_maximum=s.powers_maximum, pull=upstream.forward_kl / s.mass)
        if upstream.reverse_kl is not None:
            assert statistics.reverse_kl is not None and s.reference_total is not None
            gap = s.reference_total.log() - log_total - statistics.reverse_kl
            constant = constant + upstream.reverse_kl * gap
            slope = slope + upstream.reverse_kl
            terms = terms._replace(
                reference_maximum=s.reference_maximum, reference_slope=-upstream.reverse_kl * one_over
            )
        if upstream.jensen_shannon is not None:
            assert self._pull is not None and self._pull.mixture is not None and s.reference_total is not None
            mixed = (1.0 - self._pull.mixture) * upstream.jensen_shannon
            constant = constant - mixed * self._policy_from_mixture
            terms = terms._replace(
                reference_maximum=s.reference_maximum,
                mixture_slope=mixed * one_over,
                gap=log_total - s.reference_total.log(),
            )
        terms = terms._replace(constant=constant * one_over, slope=slope * one_over)
        write_gradient(self._real, self._temperature, self._pull, terms)
        self._logits[:, self._shard.real :] = 0
        if self._shard.real:
            mine, column = self._shard.local_column(self._targets)
            own = torch.where(mine, for_log_prob / self._temperature, 0.0).to(self._logits.dtype)
            self._real.scatter_add_(1, column[:, None], own[:, None])
        return self._logits


def _relative_to(local: RowSums, common: RowSums) -> RowSums:
    """Sums relative to this rank's maxima, made relative to the common ones."""
    moved = local.maximum - common.maximum
    scale = moved.exp()
    shifted = common._replace(
        total=scale * local.total, weighted=scale * (local.weighted + moved * local.total)
    )
    if local.mass is not None:
        assert local.powers_maximum is not None and common.powers_maximum is not None
        assert local.mass_powers is not None and local.mass_logits is not None
        moved_powers = local.powers_maximum - common.powers_maximum
        mass_scale = moved_powers.exp()
        shifted = shifted._replace(
            mass=mass_scale * local.mass,
            mass_powers=mass_scale * (local.mass_powers + moved_powers * local.mass),
            mass_logits=mass_scale * (local.mass_logits + moved * local.mass),
        )
    if local.cross is not None:
        assert local.reference_maximum is not None and common.reference_maximum is not None
        assert local.reference_total is not None
        moved_reference = local.reference_maximum - common.reference_maximum
        shifted = shifted._replace(
            reference_total=moved_reference.exp() * local.reference_total,
            cross=scale * (local.cross + moved_reference * local.total),
        )
    return shifted


def _at(x: Tensor, column: Tensor) -> Tensor:
    return x.gather(1, column[:, None]).squeeze(1) if x.size(1) else x.new_zeros(x.size(0))
