"""Countdown with partial credit: a response earns something for what it gets right on the way."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from megatron_rapo import Score

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def score(response: str, problem: Mapping[str, Any]) -> Score:
    """1 for a solution; else 0.1 for an expression, 0.2 for the right numbers, up to 0.2 for coming near."""
    expression = response.strip().rpartition("\n")[2].partition("=")[0]
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        value = value_of(tree)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return Score(0.0, {"expression": False, "numbers": False})
    used = sorted(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    numbers = used == sorted(problem["numbers"])
    facts = {"expression": True, "numbers": numbers}
    if numbers and value == problem["target"]:
        return Score(1.0, facts, answer=expression)
    near = 1 / (1 + abs(value - problem["target"]))
    return Score(0.1 + 0.2 * numbers + 0.2 * float(near), facts, answer=expression)


def value_of(node: ast.expr) -> Fraction:
    """The value of an expression of whole numbers, + − * / and brackets."""
    match node:
        case ast.Constant(int(number)):
            return Fraction(number)
        case ast.BinOp(left, operation, right) if type(operation) in OPERATORS:
            return OPERATORS[type(operation)](value_of(left), value_of(right))
    raise ValueError("no such expression")
