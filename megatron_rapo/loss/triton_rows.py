"""`rows` on a GPU: the same functions as Triton kernels, each reading every logit once.

One program sums a row, relative to maxima that move as it goes; one sums over the mixture that it makes with
the reference's; one writes a block of a row's gradient. All compute in fp32. `rows` is the truth that they
are tested against (under Triton's interpreter without a GPU).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rapo.loss.rows import LARGEST_GAP, LOWEST, GradientTerms, MixtureSums, Pull, RowSums

BLOCK = 4096
WARPS = 8
_LOWEST = tl.constexpr(LOWEST)
_LARGEST_GAP = tl.constexpr(LARGEST_GAP)


@triton.jit
def _load(pointer: Any, row: Any, stride: Any, column: Any, columns: Any, temperature: Any) -> Any:
    """A block of scaled logits; −inf, and what lies behind the row's end, becomes LOWEST."""
    x = tl.load(pointer + row.to(tl.int64) * stride + column, mask=column < columns, other=-float("inf"))
    # NaN passes through the comparison's other branch, and on into the sums.
    x = x.to(tl.float32) / temperature
    return tl.where(x < _LOWEST, _LOWEST, x)


@triton.jit
def _sum_rows(
    logits: Any,
    reference: Any,
    flattening: Any,
    out: Any,
    rows: Any,
    columns: Any,
    stride: Any,
    reference_stride: Any,
    temperature: Any,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the ten fields of RowSums, as `out` `[10, rows]`."""
    row = tl.program_id(0)
    phi = tl.load(flattening + row).to(tl.float32) if FORWARD else 0.0
    # Loops carry tensors: a constant would not keep its type.
    zero = tl.full([], 0.0, tl.float32)
    lowest = tl.full([], _LOWEST, tl.float32)
    m, total, weighted = lowest, zero, zero
    mp, mass, mass_powers, mass_logits = lowest, zero, zero, zero
    mr, reference_total, cross = lowest, zero, zero
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = _load(logits, row, stride, column, columns, temperature)
        m_new = tl.maximum(m, tl.max(tl.where(inside, z, _LOWEST)))
        scale, moved = tl.exp(m - m_new), m - m_new
        z = z - m_new
        e = tl.where(inside, tl.exp(z), 0.0)
        z = tl.where(inside, z, 0.0)
        if FORWARD or REVERSE:
            ell = _load(reference, row, reference_stride, column, columns, temperature)
        if REVERSE:
            mr_new = tl.maximum(mr, tl.max(tl.where(inside, ell, _LOWEST)))
            shifted = tl.where(inside, ell - mr_new, 0.0)
            cross = scale * (cross + (mr - mr_new) * total) + tl.sum(e * shifted)
            reference_total = tl.exp(mr - mr_new) * reference_total
            reference_total += tl.sum(tl.where(inside, tl.exp(shifted), 0.0))
            mr = mr_new
        if FORWARD:
            u = phi * ell
            mp_new = tl.maximum(mp, tl.max(tl.where(inside, u, _LOWEST)))
            mass_scale, mass_moved = tl.exp(mp - mp_new), mp - mp_new
            u = tl.where(inside, u - mp_new, 0.0)
            p = tl.where(inside, tl.exp(u), 0.0)
            mass_logits = mass_scale * (mass_logits + moved * mass) + tl.sum(p * z)
            mass_powers = mass_scale * (mass_powers + mass_moved * mass) + tl.sum(p * u)
            mass = mass_scale * mass + tl.sum(p)
            mp = mp_new
        weighted = scale * (weighted + moved * total) + tl.sum(e * z)
        total = scale * total + tl.sum(e)
        m = m_new
    tl.store(out + row, m)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, weighted)
    tl.store(out + 3 * rows + row, mp)
    tl.store(out + 4 * rows + row, mass)
    tl.store(out + 5 * rows + row, mass_powers)
    tl.store(out + 6 * rows + row, mass_logits)
    tl.store(out + 7 * rows + row, mr)
    tl.store(out + 8 * rows + row, reference_total)
    tl.store(out + 9 * rows + row, cross)


@triton.jit
def _log_mixture(gap: Any, share: Any) -> Any:
    """log(1 + share (e^gap − 1))."""
    return tl.log(1.0 - share + share * tl.exp(tl.minimum(gap, _LARGEST_GAP)))


@triton.jit
def _mix_rows(
    logits: Any,
    reference: Any,
    normalisers: Any,
    out: Any,
    rows: Any,
    columns: Any,
    stride: Any,
    reference_stride: Any,
    temperature: Any,
    share: Any,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the fields of MixtureSums, as `out` `[2, rows]`; `normalisers` `[2, rows]` are log Σ exp."""
    row = tl.program_id(0)
    log_total, log_reference_total = tl.load(normalisers + row), tl.load(normalisers + rows + row)
    of_policy = tl.full([], 0.0, tl.float32)
    of_reference = tl.full([], 0.0, tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        log_policy = _load(logits, row, stride, column, columns, temperature) - log_total
        log_reference = _load(reference, row, reference_stride, column, columns, temperature)
        log_reference -= log_reference_total
        gap = log_reference - log_policy
        of_policy -= tl.sum(tl.where(inside, tl.exp(log_policy) * _log_mixture(gap, share), 0.0))
        mixed = tl.exp(log_reference) * _log_mixture(-gap, 1.0 - share)
        of_reference -= tl.sum(tl.where(inside, mixed, 0.0))
    tl.store(out + row, of_policy)
    tl.store(out + rows + row, of_reference)


@triton.jit
def _write_rows(
    logits: Any,
    reference: Any,
    flattening: Any,
    terms: Any,
    rows: Any,
    columns: Any,
    stride: Any,
    reference_stride: Any,
    temperature: Any,
    share: Any,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    MIXTURE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Overwrites a block of logits; `terms` `[9, rows]` are GradientTerms' fields."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = _load(logits, row, stride, column, columns, temperature) - tl.load(terms + row)
    factor = tl.load(terms + rows + row) + tl.load(terms + 2 * rows + row) * z
    if FORWARD or REVERSE or MIXTURE:
        ell = _load(reference, row, reference_stride, column, columns, temperature)
    if REVERSE:
        factor += tl.load(terms + 6 * rows + row) * (ell - tl.load(terms + 5 * rows + row))
    if MIXTURE:
        gap = ell - tl.load(terms + 5 * rows + row) - z + tl.load(terms + 8 * rows + row)
        factor -= tl.load(terms + 7 * rows + row) * _log_mixture(gap, share)
    gradient = factor * tl.exp(z)
    if FORWARD:
        phi = tl.load(flattening + row).to(tl.float32)
        gradient -= tl.load(terms + 4 * rows + row) * tl.exp(phi * ell - tl.load(terms + 3 * rows + row))
    target = logits + row.to(tl.int64) * stride + column
    tl.store(target, (gradient / temperature).to(logits.dtype.element_ty), mask=column < columns)


def row_sums(logits: Tensor, temperature: float, pull: Pull | None) -> RowSums:
    """As `rows.row_sums`."""
    rows, columns = logits.shape
    forward, reverse = pull is not None and pull.forward, pull is not None and pull.normalises
    out = torch.empty(len(RowSums._fields), rows, dtype=torch.float32, device=logits.device)
    reference, flattening = _pointers(logits, pull)
    if rows:
        _sum_rows[(rows,)](
            logits, reference, flattening, out, rows, columns, logits.stride(0), reference.stride(0),
            temperature, FORWARD=forward, REVERSE=reverse, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    kept = [True] * 3 + [forward] * 4 + [reverse] * 3
    return RowSums._make(out[field] if wanted else None for field, wanted in enumerate(kept))


def mixture_sums(logits: Tensor, temperature: float, pull: Pull, sums: RowSums) -> MixtureSums:
    """As `rows.mixture_sums`."""
    assert sums.reference_maximum is not None and sums.reference_total is not None
    rows, columns = logits.shape
    out = torch.empty(len(MixtureSums._fields), rows, dtype=torch.float32, device=logits.device)
    normalisers = torch.stack(
        [sums.maximum + sums.total.log(), sums.reference_maximum + sums.reference_total.log()]
    ).float()
    if rows:
        _mix_rows[(rows,)](
            logits, pull.logits, normalisers, out, rows, columns, logits.stride(0), pull.logits.stride(0),
            temperature, pull.mixture, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return MixtureSums._make(out)


def write_gradient(logits: Tensor, temperature: float, pull: Pull | None, terms: GradientTerms) -> None:
    """As `rows.write_gradient`."""
    rows, columns = logits.shape
    if not rows or not columns:
        return
    reference, flattening = _pointers(logits, pull)
    nothing = torch.zeros_like(terms.maximum)
    stacked = torch.stack([nothing if term is None else term for term in terms]).float()
    _write_rows[(rows, triton.cdiv(columns, BLOCK))](
        logits, reference, flattening, stacked, rows, columns, logits.stride(0), reference.stride(0),
        temperature, 0.0 if pull is None or pull.mixture is None else pull.mixture,
        FORWARD=terms.pull is not None, REVERSE=terms.reference_slope is not None,
        MIXTURE=terms.mixture_slope is not None, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _pointers(logits: Tensor, pull: Pull | None) -> tuple[Tensor, Tensor]:
    """The reference's logits and φ; where there are none, something to point at."""
    return (logits, logits) if pull is None else (pull.logits, pull.flattening)
