"""The Triton kernels, under Triton's interpreter, against the PyTorch functions that they stand in for."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest
import torch

COLUMNS = 5000  # more than a block, and no multiple of one


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    pytest.importorskip("triton", reason="needs triton (in the extra `dev` on Linux)")
    # The interpreter is chosen when triton is imported: in a process of its own.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply_async(measure).get(timeout=300)
    finally:
        del os.environ["TRITON_INTERPRET"]


CASES = [
    "none",
    "forward",
    "reverse",
    "both",
    "mixture",
    "bfloat16",
    "masked",
    "rising",
    "no columns",
    "no rows",
]


@pytest.mark.parametrize("case", CASES)
def test_sums_and_gradient_equal_pytorch(errors: dict[str, float], case: str) -> None:
    # In bf16 the gradient is rounded on writing, once in either implementation.
    assert errors[case] <= (1e-2 if case == "bfloat16" else 2e-5)


class Launched:
    """A kernel that must not be launched for nothing, which GPUs refuse."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert 0 not in grid
        return self._kernel[grid]


def measure() -> dict[str, float]:
    """In a process whose Triton interprets: each case's largest relative difference."""
    from megatron_rapo.loss import triton_rows

    for name in ("_sum_rows", "_mix_rows", "_write_rows"):
        setattr(triton_rows, name, Launched(getattr(triton_rows, name)))
    return {case: _difference(case) for case in CASES}


def _difference(case: str) -> float:
    from megatron_rapo.loss import rows, triton_rows

    random = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    # A column more than the rows use, as padded vocabularies have it: the stride is not the width.
    whole, other = (3.0 * torch.randn(3, COLUMNS + 1, generator=random).to(dtype) for _ in "ab")
    logits, reference = whole[:, :COLUMNS], other[:, :COLUMNS]
    if case == "masked":
        logits[:, 7], reference[:, 7] = -torch.inf, -torch.inf
    if case == "rising":  # the reference's maximum is in the last block, most of the policy's mass before it
        reference = reference.sort(dim=1).values
    if case == "no columns":
        logits, reference = logits[:, :0], reference[:, :0]
    if case == "no rows":
        logits, reference = logits[:0], reference[:0]
    forward, reverse = (
        case not in ("none", "reverse", "mixture"),
        case not in ("none", "forward", "mixture", "no columns", "no rows"),
    )
    mixture = None if case in ("none", "forward", "reverse", "no columns") else 0.3
    phi = torch.tensor([0.3, 0.7, 1.0])[: len(logits)]
    pull = None if case == "none" else rows.Pull(reference, phi, forward, reverse, mixture)

    expected, found = (module.row_sums(logits, 0.8, pull) for module in (rows, triton_rows))
    worst = [_relative(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert all((a is None) == (b is None) for a, b in zip(found, expected, strict=True))

    if mixture is not None and pull is not None:
        sums = [module.mixture_sums(logits, 0.8, pull, expected) for module in (rows, triton_rows)]
        worst += [_relative(a, b) for a, b in zip(*sums[::-1], strict=True)]

    one = torch.tensor([0.5, -1.0, 2.0])[: len(logits)]
    terms = rows.GradientTerms(expected.maximum, one, 0.1 * one)
    if forward:
        terms = terms._replace(powers_maximum=expected.powers_maximum, pull=0.2 * one)
    if reverse:
        terms = terms._replace(reference_maximum=expected.reference_maximum, reference_slope=0.3 * one)
    if mixture is not None:
        terms = terms._replace(
            reference_maximum=expected.reference_maximum, mixture_slope=0.4 * one, gap=0.5 * one
        )
    written = [logits.clone(), logits.clone()]
    for module, target in zip((rows, triton_rows), written, strict=True):
        module.write_gradient(target, 0.8, pull, terms)
    # Python's max lets NaN pass.
    return torch.tensor([*worst, _relative(written[1], written[0])]).max().item()


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    scale = expected.double().abs().max().clamp(min=1e-6)
    return float((found.double() - expected.double()).abs().max() / scale)
