"""A calculator: exact arithmetic, for models that are too small to do it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

_LARGEST = 10**30  # of numerators and denominators
_LARGEST_EXPONENT = 100

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda one, other: Fraction(one // other),
    ast.Mod: operator.mod,
}


def calculator(expression: str) -> str:
    """Calculates an arithmetic expression exactly.

    Args:
        expression: Numbers, + - * / // % **, and parentheses.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{expression!r:.80} is no arithmetic expression") from error
    return _text(_value(tree.body))


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(str(node.value))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _value(node.left), _value(node.right)
        if exponent.denominator != 1 or abs(exponent) > _LARGEST_EXPONENT:
            raise ValueError(f"the exponent {exponent} is no whole number up to {_LARGEST_EXPONENT}")
        value = base ** int(exponent)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError(f"{ast.unparse(node):.80} is no arithmetic")
    if max(abs(value.numerator), value.denominator) > _LARGEST:
        raise ValueError("a number is too large")
    return value


def _text(value: Fraction) -> str:
    """A whole number, a decimal that is exact, or else twelve digits."""
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.12g}"
