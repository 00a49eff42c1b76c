"""`rows` on a GPU: the same two functions as Triton kernels, each reading every logit once.

One program sums a row, relative to maxima that move as it goes; one writes a block of a row's gradient. Both
compute in fp32. `rows` is the truth that they are tested against (under Triton's interpreter without a GPU).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_rapo.loss.rows import LOWEST, GradientTerms, Pull, RowSums

BLOCK = 4096
WARPS = 8
_LOWEST = tl.constexpr(LOWEST)


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
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Overwrites a block of logits; `terms` `[7, rows]` are GradientTerms' fields."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = _load(logits, row, stride, column, columns, temperature) - tl.load(terms + row)
    factor = tl.load(terms + rows + row) + tl.load(terms + 2 * rows + row) * z
    if FORWARD or REVERSE:
        ell = _load(reference, row, reference_stride, column, columns, temperature)
    if REVERSE:
        factor += tl.load(terms + 6 * rows + row) * (ell - tl.load(terms + 5 * rows + row))
    gradient = factor * tl.exp(z)
    if FORWARD:
        phi = tl.load(flattening + row).to(tl.float32)
        gradient -= tl.load(terms + 4 * rows + row) * tl.exp(phi * ell - tl.load(terms + 3 * rows + row))
    target = logits + row.to(tl.int64) * stride + column
    tl.store(target, (gradient / temperature).to(logits.dtype.element_ty), mask=column < columns)


def row_sums(logits: Tensor, temperature: float, pull: Pull | None) -> RowSums:
    """As `rows.row_sums`."""
    rows, columns = logits.shape
    forward, reverse = pull is not None and pull.forward, pull is not None and pull.reverse
    out = torch.empty(len(RowSums._fields), rows, dtype=torch.float32, device=logits.device)
    reference, flattening = _pointers(logits, pull)
    if rows:
        _sum_rows[(rows,)](
            logits, reference, flattening, out, rows, columns, logits.stride(0), reference.stride(0),
            temperature, FORWARD=forward, REVERSE=reverse, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    kept = [True] * 3 + [forward] * 4 + [reverse] * 3
    return RowSums._make(out[field] if wanted else None for field, wanted in enumerate(kept))


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
        temperature, FORWARD=terms.pull is not None, REVERSE=terms.reference_slope is not None,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def _pointers(logits: Tensor, pull: Pull | None) -> tuple[Tensor, Tensor]:
    """The reference's logits and φ; where there are none, something to point at."""
    return (logits, logits) if pull is None else (pull.logits, pull.flattening)
