"""A tool of one's own: a plain function, whose hints and docstring are all that the policy is told."""

import re


def calculate(expression: str) -> str:
    """Calculates a sum, from left to right.

    Args:
        expression: Whole numbers with +, - and * between them.
    """
    if not re.fullmatch(r"\d+([-+*]\d+)*", expression):
        raise ValueError(f"{expression!r} is no sum")
    value = 0
    for operator, number in re.findall(r"(^|[-+*])(\d+)", expression):
        value = {"": int, "+": value.__add__, "-": value.__sub__, "*": value.__mul__}[operator](int(number))
    return str(value)
