"""What passes the certificate: both errors, and no NaN."""

from __future__ import annotations

import math

import pytest

from megatron_rapo.certify.measure import BARS, Result

BAR = BARS["float32"]


@pytest.mark.parametrize(
    ("loss_error", "gradient_error", "passes"),
    [
        (0.0, BAR, True),
        (BAR, 0.0, True),
        (2 * BAR, 0.0, False),
        (0.0, 2 * BAR, False),
        (math.nan, 0.0, False),
        (0.0, math.nan, False),
    ],
)
def test_both_errors_must_be_within_the_bar(loss_error: float, gradient_error: float, passes: bool) -> None:
    result = Result("tp2", "float32", 1.0, 1.0, loss_error, gradient_error)
    assert result.passed == passes
