r"""When two quantities have the same value.

| gold | an answer is equal if |
|---|---|
| exact: `3/4`, `\frac{1}{2^{99}}`, `2\sqrt{3}` | it has this very value, or rounds it to ten digits or more |
| a decimal: `0.347`, `1.6e-19` | it is within two millionths of it and half a unit of its last digit |
| with variables: `x^2+1` | both have the same values wherever both are real, tried at fixed points |

An integer is not rounded. What the gold has done is not left undone: `\max(1,5)`, `2+3` and `\cos 60^\circ`
are no answers where the gold is a number, while fractions, powers, roots, factorials and binomials are.
"""

from __future__ import annotations

import random
import re
from typing import Any

import sympy

from megatron_rapo.reward.quantity import Quantity

_RELATIVE = sympy.Rational(2, 10**6)
_SHORTEST_ROUNDED = 10  # significant digits of a decimal that may stand for an exact value
_POINTS = 6
_DIGITS = 30
_MOST_DIGITS = 6000

_UNSIGNED = r"(?:\d+\.?\d*|\.\d+)"
_RESTATING = re.compile(
    r"\\(max|min|gcd|lcm|sum|prod|int|iint|oint|lim|det|[lr]?floor|[lr]?ceil|bmod|mod|sup|inf|deg|log|lg|ln|exp|"
    r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?)(?![A-Za-z])|(\|)"
)
_PLAIN_ARITHMETIC = re.compile(
    rf"[-+\s()]*{_UNSIGNED}(?:[-+\s()]*(?:[-+]|\\times|\\cdot)[-+\s()]*{_UNSIGNED})+[\s()]*"
)
_PLAIN_FRACTION = re.compile(
    rf"\\frac\s*\{{\s*-?{_UNSIGNED}\s*\}}\s*\{{\s*-?{_UNSIGNED}\s*\}}|{_UNSIGNED}\s*/\s*{_UNSIGNED}"
)


def restates(gold: Quantity, answer: Quantity) -> bool:
    r"""Whether the answer leaves undone what the gold has done: `\max(1,5)` or `2+3` for 5."""
    done = {found[0] for found in _RESTATING.finditer(gold.text)}
    left = {found[0] for found in _RESTATING.finditer(answer.text)}
    if gold.symbols:
        left &= {"\\max", "\\min", "\\gcd", "\\lcm", "\\sum", "\\prod", "\\int", "\\lim", "\\det"}
    elif not gold.number:
        left -= {
            sign
            for sign in left
            if sign.lstrip("\\").startswith(
                ("log", "ln", "lg", "exp", "arc", "sin", "cos", "tan", "cot", "sec", "csc")
            )
        }
    if left - done:
        return True
    return gold.number and _PLAIN_ARITHMETIC.fullmatch(_PLAIN_FRACTION.sub("1", answer.text)) is not None


def same_value(gold: Quantity, answer: Quantity) -> bool:
    """Whether the answer's value is the gold's, percent signs and units aside."""
    a, b = gold.value, answer.value
    if gold.number and answer.number:
        return _close(gold, a, b) or _rounded(a, answer)
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return _same_entries(a, b)
    try:
        if gold.symbols | answer.symbols:
            return _same_function(a, b)
        return _same_constant(gold, answer)
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):
        return False  # SymPy has no value for one of them


def _same_entries(a: Any, b: Any) -> bool:
    if getattr(a, "shape", None) != getattr(b, "shape", None):
        return False
    return all(
        same_value(Quantity("", one), Quantity("", other))
        for one, other in zip(a.flat(), b.flat(), strict=True)
    )


def _close(gold: Quantity, a: Any, b: Any) -> bool:
    if gold.ulp is None:
        return bool(a == b)
    return bool(abs(a - b) <= min(_RELATIVE * abs(a), gold.ulp / 2))


def _rounded(exact: Any, decimal: Quantity) -> bool:
    """Whether a long decimal is what an exact value, no integer, rounds to or begins with."""
    if decimal.ulp is None or decimal.digits < _SHORTEST_ROUNDED or exact.is_Integer:
        return False
    left = (exact - decimal.value) * (-1 if exact < 0 else 1)
    return bool(-decimal.ulp / 2 <= left < decimal.ulp)


def _same_constant(gold: Quantity, answer: Quantity) -> bool:
    a, b = gold.value, answer.value
    rough = a.evalf(15)
    size = abs(rough)
    if size in (sympy.oo, sympy.nan, sympy.zoo) or not rough.is_number:
        return bool(a == b)
    digits = _DIGITS + (min(_MOST_DIGITS, abs(int(sympy.log(size, 10).evalf(15)))) if size else 0)
    precise = [_value(one, digits) for one in (a, b)]
    if None in precise:
        return False
    one, other = precise
    if gold.ulp is not None and _real(other):
        return _close(gold, sympy.Rational(a), sympy.Rational(other))
    if _real(one) and not a.is_integer and _rounded(sympy.Rational(one), answer):
        return True
    return _near(one, other, digits)


def _real(value: Any) -> bool:
    return bool(value.is_Float or value.is_Rational)


def _value(expression: Any, digits: int, point: dict[Any, Any] | None = None) -> Any | None:
    """The numerical value; None where there is none."""
    value = expression.evalf(digits, subs=point, chop=False)
    if not value.is_number or not value.is_finite or value.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    return value if not value.free_symbols else None


def _near(one: Any, other: Any, digits: int) -> bool:
    scale = max(abs(one), abs(other))
    if scale < sympy.Float(10) ** (-2 * digits):
        return True
    return bool(abs(one - other) < scale * sympy.Float(10) ** (10 - digits))


def _same_function(a: Any, b: Any) -> bool:
    """Whether two expressions agree where both are real; at whole numbers if no other points are."""
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for whole in (False, True):
        agreed = 0
        for number in range(_POINTS):
            point = dict(zip(symbols, _coordinates(len(symbols), number, whole), strict=True))
            one, other = _value(a, _DIGITS, point), _value(b, _DIGITS, point)
            if one is None or other is None:
                continue
            complex_values = not (one.is_real and other.is_real)
            if _near(one, other, _DIGITS):
                agreed += 1
            elif not complex_values or a.has(sympy.I) or b.has(sympy.I):
                return False
        if agreed:
            return True
    return False


def _coordinates(count: int, number: int, whole: bool) -> list[Any]:
    """Fixed values for variables; every other point has negative ones."""
    draw = random.Random(number)
    if whole:
        return [sympy.Integer(draw.randrange(2, 12)) for _ in range(count)]
    signs = [draw.choice((-1, 1)) if number % 2 else 1 for _ in range(count)]
    return [sign * sympy.Rational(draw.randrange(100, 400), 151) for sign in signs]
