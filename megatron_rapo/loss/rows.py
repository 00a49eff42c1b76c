"""What is computed of whole rows of logits: sums before the tensor-parallel exchange, the gradient after.

Functions, each one pass over a chunk of logits `[rows, columns]` that is never copied: `row_sums` and
`mixture_sums` read it, `write_gradient` overwrites it with the gradient. They work through blocks of rows
that fit in the cache, in fp32 at least, whatever the logits' type.

Notation, per row: z = logits / T; m = max z; e = exp(z − m). The reference's ℓ likewise with maximum mr; the
flattened reference's powers u = φ ℓ with maximum mp and mass = exp(u − mp). π = softmax(z), q = softmax(ℓ),
M = (1 − β) π + β q their mixture, and d = log q − log π = (ℓ − mr) − (z − m) + gap, so that
log(π / M) = −log(1 + β (e^d − 1)) and log(q / M) = −log(1 + (1 − β) (e^−d − 1)).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Stands for a logit that is −inf, and for the maximum of no logits: exp(LOWEST − x) is 0, and 0 × LOWEST too.
LOWEST = -1e30
BLOCK_ELEMENTS = 1 << 19
# Of d: e^d stays finite in fp32, and what it is multiplied with is 0 beyond.
LARGEST_GAP = 80.0


class Pull(NamedTuple):
    """The reference's logits of the same rows, and which divergences from it are wanted.

    Attributes:
        logits: `[rows, columns]`.
        flattening: `[rows]`, φ.
        forward: the KL of the policy from the flattened reference.
        reverse: the KL of the reference, as it is, from the policy.
        mixture: β, the reference's share in M, for their Jensen–Shannon divergence; None: it is not wanted.
    """

    logits: Tensor
    flattening: Tensor
    forward: bool
    reverse: bool
    mixture: float | None = None

    @property
    def normalises(self) -> bool:
        """Whether sums over the reference as it is are wanted."""
        return self.reverse or self.mixture is not None


class RowSums(NamedTuple):
    """Per row, over this rank's columns; each `[rows]`, fp32 at least, or None if not wanted.

    Attributes:
        maximum: m.
        total: Σ e.
        weighted: Σ e (z − m).
        powers_maximum, mass, mass_powers, mass_logits: mp, Σ mass, Σ mass (u − mp), Σ mass (z − m).
        reference_maximum, reference_total, cross: mr, Σ exp(ℓ − mr), Σ e (ℓ − mr).
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    powers_maximum: Tensor | None = None
    mass: Tensor | None = None
    mass_powers: Tensor | None = None
    mass_logits: Tensor | None = None
    reference_maximum: Tensor | None = None
    reference_total: Tensor | None = None
    cross: Tensor | None = None


class MixtureSums(NamedTuple):
    """Per row, over this rank's columns; each `[rows]`, fp32 at least.

    Attributes:
        policy: Σ π log(π / M).
        reference: Σ q log(q / M).
    """

    policy: Tensor
    reference: Tensor


class GradientTerms(NamedTuple):
    """Per row, what makes the gradient
    e (constant + slope (z − m) + reference_slope (ℓ − mr) + mixture_slope log(π / M)) − pull mass.

    Attributes:
        maximum, powers_maximum, reference_maximum: m, mp, mr over all ranks.
        constant, slope, reference_slope, mixture_slope, pull: `[rows]`; the last three None where no
            divergence needs them.
        gap: log Σ e − log Σ exp(ℓ − mr) over all ranks; None without `mixture_slope`.
    """

    maximum: Tensor
    constant: Tensor
    slope: Tensor
    powers_maximum: Tensor | None = None
    pull: Tensor | None = None
    reference_maximum: Tensor | None = None
    reference_slope: Tensor | None = None
    mixture_slope: Tensor | None = None
    gap: Tensor | None = None


def row_sums(logits: Tensor, temperature: float, pull: Pull | None) -> RowSums:
    """Sums over the columns of `logits` `[rows, columns]` (real ones only), relative to local maxima."""
    blocks = [_block_sums(logits[rows], temperature, _rows_of(pull, rows)) for rows in _blocks(logits)]
    columns = zip(*blocks, strict=True)
    return RowSums._make(None if parts[0] is None else torch.cat(parts) for parts in columns)


def mixture_sums(logits: Tensor, temperature: float, pull: Pull, sums: RowSums) -> MixtureSums:
    """Sums over the columns of `logits` `[rows, columns]`, given `row_sums` over all ranks' columns."""
    blocks = [
        _block_mixture(
            logits[rows],
            temperature,
            pull._replace(logits=pull.logits[rows]),
            RowSums._make(None if each is None else each[rows, None] for each in sums),
        )
        for rows in _blocks(logits)
    ]
    return MixtureSums._make(torch.cat(parts) for parts in zip(*blocks, strict=True))


def write_gradient(logits: Tensor, temperature: float, pull: Pull | None, terms: GradientTerms) -> None:
    """Overwrites `logits` `[rows, columns]` with the gradient in them, the targets' own part left out."""
    for rows in _blocks(logits):
        part = GradientTerms._make(None if term is None else term[rows, None] for term in terms)
        _write_block(logits[rows], temperature, _rows_of(pull, rows), part)


def _block_sums(logits: Tensor, temperature: float, pull: Pull | None) -> RowSums:
    z = _scaled(logits, temperature)
    maximum = _maximum(z)
    z -= maximum[:, None]
    e = z.exp()
    sums = RowSums(maximum, e.sum(-1), _dot(e, z))
    if pull is None:
        return sums
    reference = _scaled(pull.logits, temperature)
    if pull.normalises:
        reference_maximum = _maximum(reference)
        shifted = reference - reference_maximum[:, None]
        sums = sums._replace(
            reference_maximum=reference_maximum,
            cross=_dot(e, shifted),
            reference_total=shifted.exp_().sum(-1),
        )
    if pull.forward:
        powers = reference.mul_(pull.flattening.to(reference.dtype)[:, None])
        powers_maximum = _maximum(powers)
        powers -= powers_maximum[:, None]
        mass = powers.exp()
        sums = sums._replace(
            powers_maximum=powers_maximum,
            mass=mass.sum(-1),
            mass_powers=_dot(mass, powers),
            mass_logits=_dot(mass, z),
        )
    return sums


def _block_mixture(logits: Tensor, temperature: float, pull: Pull, sums: RowSums) -> MixtureSums:
    assert sums.reference_maximum is not None and sums.reference_total is not None
    share = pull.mixture
    assert share is not None
    log_policy = _scaled(logits, temperature).sub_(sums.maximum + sums.total.log())
    log_reference = _scaled(pull.logits, temperature)
    log_reference -= sums.reference_maximum + sums.reference_total.log()
    gap = log_reference - log_policy
    return MixtureSums(
        -_dot(log_policy.exp_(), _log_mixture(gap, share)),
        -_dot(log_reference.exp_(), _log_mixture(-gap, 1.0 - share)),
    )


def _log_mixture(gap: Tensor, share: float) -> Tensor:
    """log(1 + share (e^gap − 1)): of the mixture, relative to what has the other share."""
    return gap.clamp(max=LARGEST_GAP).expm1_().mul_(share).log1p_()


def _write_block(logits: Tensor, temperature: float, pull: Pull | None, terms: GradientTerms) -> None:
    z = _scaled(logits, temperature) - terms.maximum
    e = z.exp()
    mixed = None
    if pull is not None and pull.mixture is not None and terms.mixture_slope is not None:
        assert terms.reference_maximum is not None and terms.gap is not None
        gap = _scaled(pull.logits, temperature).sub_(terms.reference_maximum).sub_(z).add_(terms.gap)
        mixed = _log_mixture(gap, pull.mixture).mul_(terms.mixture_slope)
    gradient = z.mul_(terms.slope).add_(terms.constant)
    if pull is not None and terms.reference_slope is not None and terms.reference_maximum is not None:
        reference = _scaled(pull.logits, temperature).sub_(terms.reference_maximum)
        gradient.addcmul_(reference, terms.reference_slope)
    if mixed is not None:
        gradient -= mixed
    gradient.mul_(e)
    if pull is not None and terms.pull is not None and terms.powers_maximum is not None:
        powers = _scaled(pull.logits, temperature).mul_(pull.flattening.to(e.dtype)[:, None])
        gradient.addcmul_(powers.sub_(terms.powers_maximum).exp_(), terms.pull, value=-1.0)
    logits.copy_(gradient.div_(temperature))


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, columns = logits.shape
    # On a GPU there is no cache to stay in, and every block costs launches.
    size = rows if logits.is_cuda else max(1, BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, max(rows, 1), max(size, 1)):
        yield slice(start, start + size)


def _rows_of(pull: Pull | None, rows: slice) -> Pull | None:
    return None if pull is None else pull._replace(logits=pull.logits[rows], flattening=pull.flattening[rows])


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """A copy in fp32 at least, over T; −inf becomes LOWEST, so that no product with it is NaN."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return scaled.clamp_(min=LOWEST)


def _maximum(x: Tensor) -> Tensor:
    # A shard may hold padding alone.
    return x.amax(-1) if x.size(-1) else x.new_full((x.size(0),), LOWEST)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)
