"""The tool by itself: `pytest examples/tools`."""

import pytest
from my_tools import calculate


@pytest.mark.parametrize(
    ("expression", "value"), [("20+17", "37"), ("3*4+5", "17"), ("5-7", "-2"), ("8", "8")]
)
def test_a_sum(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["", "3+", "+3", "3 4", "2**3", "boxed"])
def test_what_is_no_sum_is_refused(expression):
    with pytest.raises(ValueError, match="no sum"):
        calculate(expression)
