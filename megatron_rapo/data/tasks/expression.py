"""Exact values of arithmetic expressions. Nothing here evaluates text as code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

_TOKEN = re.compile(r"[1-9][0-9]*|[-+*/()]")


class MalformedExpression(Exception):
    """The text is not an expression of whole numbers, + - * / and brackets."""


def flat_value(numbers: Sequence[int], operators: Sequence[str]) -> int | Fraction:
    """The value of numbers (≥ 1) joined by operators without brackets; * and / bind before + and -."""
    total: int | Fraction = 0
    term: int | Fraction = numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            term *= number
        elif operator == "/":
            term = Fraction(term) / number
        else:
            total += term
            term = number if operator == "+" else -number
    return total + term


def tokenize(expression: str) -> list[str]:
    """Numbers (without leading zeros), operators and brackets.

    Raises:
        MalformedExpression: something else stands between them.
    """
    if _TOKEN.sub("", expression).strip(" \t"):
        raise MalformedExpression(expression)
    return _TOKEN.findall(expression)


def value(tokens: list[str]) -> Fraction:
    """The value of an expression with binary operators and brackets; recursion is as deep as its brackets.

    Raises:
        MalformedExpression: the tokens do not form one.
        ZeroDivisionError: it divides by zero.
    """
    return _Parser(tokens).value()


class _Parser:
    """Recursive descent: sum = product {± product}; product = factor {×÷ factor}; factor = number | (sum)."""

    def __init__(self, tokens: list[str]) -> None:
        self._rest = tokens[::-1]

    def value(self) -> Fraction:
        result = self._sum()
        if self._rest:
            raise MalformedExpression(f"unexpected {self._rest[-1]!r}")
        return result

    def _sum(self) -> Fraction:
        result = self._product()
        while self._next_is("+-"):
            result = result + self._product() if self._rest.pop() == "+" else result - self._product()
        return result

    def _product(self) -> Fraction:
        result = self._factor()
        while self._next_is("*/"):
            result = result * self._factor() if self._rest.pop() == "*" else result / self._factor()
        return result

    def _factor(self) -> Fraction:
        token = self._rest.pop() if self._rest else "the end"
        if token.isdigit():
            return Fraction(int(token))
        if token != "(":
            raise MalformedExpression(f"unexpected {token!r}")
        result = self._sum()
        if not self._next_is(")"):
            raise MalformedExpression("a bracket is not closed")
        self._rest.pop()
        return result

    def _next_is(self, choices: str) -> bool:
        return bool(self._rest) and self._rest[-1] in choices
