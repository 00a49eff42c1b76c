r"""Numbers and expressions as they are written, read exactly.

A number is exact: `0.75` is 3/4, `2.5e-7` is 1/4,000,000, `2 1/2` is 5/2. Everything else is parsed by
latex2sympy2_extended, without folding upper and lower case, and not evaluated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational

from megatron_rapo.reward.units import Beside, separate

_LARGEST_EXPONENT = 5000
_LONGEST_NUMBER = 2000  # characters

_UNSIGNED = r"(?:\d+\.?\d*|\.\d+)"
_SIGN = r"([-+]?)\s*"
_DECIMAL = re.compile(rf"{_SIGN}({_UNSIGNED})")
_SCIENTIFIC = re.compile(
    rf"{_SIGN}({_UNSIGNED})\s*(?:[eE]\s*\{{?\s*([-+]?\d+)\s*\}}?"
    r"|(?:\\times|\\cdot|x|X)\s*10\s*\^\s*\{?\s*([-+]?\s*\d+)\s*\}?)"
)
_POWER_OF_TEN = re.compile(rf"{_SIGN}10\s*\^\s*\{{\s*([-+]?\s*\d+)\s*\}}")
_FRACTION = re.compile(
    rf"{_SIGN}(?:\\frac\s*\{{\s*([-+]?{_UNSIGNED})\s*\}}\s*\{{\s*([-+]?{_UNSIGNED})\s*\}}|({_UNSIGNED})\s*/\s*({_UNSIGNED}))"
)
_MIXED = re.compile(rf"{_SIGN}(\d+)\s*(?:\s(\d+)\s*/\s*(\d+)|\\frac\s*\{{\s*(\d+)\s*\}}\s*\{{\s*(\d+)\s*\}})")


@dataclass(frozen=True)
class Quantity:
    r"""A number or expression, with what stands beside it.

    Attributes:
        text: without what stands beside it.
        value: SymPy expression or matrix, not evaluated; a Rational where the text is a number.
        ulp: of a decimal, a unit of its last digit; None where the number is exact.
        digits: significant digits of a decimal.
    """

    text: str
    value: Any
    ulp: sympy.Rational | None = None
    digits: int = 0
    beside: Beside = field(default_factory=Beside)

    @property
    def number(self) -> bool:
        """Whether it is written as a number."""
        return isinstance(self.value, sympy.Rational)

    def scaled(self, factor: sympy.Rational) -> Quantity:
        """This many of it."""
        ulp = None if self.ulp is None else self.ulp * factor
        return replace(self, value=self.value * factor, ulp=ulp)

    @property
    def symbols(self) -> frozenset[str]:
        """Names of its variables."""
        return frozenset(str(symbol) for symbol in getattr(self.value, "free_symbols", ()))


def read_quantity(text: str) -> Quantity | None:
    """The quantity that plain LaTeX gives; None where it cannot be read as one."""
    number, beside = separate(text)
    value, ulp, digits = _number(number) or (_expression(number), None, 0)
    return None if value is None else Quantity(number, value, ulp, digits, beside)


def _number(text: str) -> tuple[sympy.Rational, sympy.Rational | None, int] | None:
    """A number's exact value; of a decimal a unit of its last digit, and its significant digits."""
    if len(text) > _LONGEST_NUMBER:
        return None
    if found := _DECIMAL.fullmatch(text):
        return _signed(found[1], *_decimal(found[2], 0))
    if found := _SCIENTIFIC.fullmatch(text):
        exponent = int((found[3] or found[4]).replace(" ", ""))
        return _signed(found[1], *_decimal(found[2], exponent)) if abs(exponent) < _LARGEST_EXPONENT else None
    if found := _POWER_OF_TEN.fullmatch(text):
        exponent = int(found[2].replace(" ", ""))
        return (
            _signed(found[1], sympy.Integer(10) ** exponent, None, 0)
            if abs(exponent) < _LARGEST_EXPONENT
            else None
        )
    if found := _FRACTION.fullmatch(text):
        above, below = (
            sympy.Rational(part.replace(" ", "")) for part in found.groups()[1:] if part is not None
        )
        return _signed(found[1], above / below, None, 0) if below else None
    if found := _MIXED.fullmatch(text):
        whole, above, below = (sympy.Integer(part) for part in found.groups()[1:] if part is not None)
        if 0 < above < below:
            return _signed(found[1], whole + above / below, None, 0)
    return None


def _signed(
    sign: str, value: sympy.Rational, ulp: sympy.Rational | None, digits: int
) -> tuple[sympy.Rational, sympy.Rational | None, int]:
    return (-value if sign == "-" else value), ulp, digits


def _decimal(text: str, exponent: int) -> tuple[sympy.Rational, sympy.Rational | None, int]:
    whole, point, places = text.partition(".")
    value = sympy.Rational(int((whole or "0") + places), 10 ** len(places)) * sympy.Integer(10) ** exponent
    if not places.rstrip("0") and (exponent >= 0 or not point):  # 42, 42.0, 1e6
        return value, None, 0
    digits = len((whole + places).lstrip("0"))
    return value, sympy.Integer(10) ** (exponent - len(places)), digits


_PARSER = ConversionConfig(lowercase_symbols=False)
_NO_QUANTITIES = (sympy.Set, sympy.Tuple, Relational, list, type(None))
_CLEANING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"_\s*\{?\s*\\text\{\s*([A-Za-z0-9]+)\s*\}\s*\}?|_\s*\{\s*\\?([A-Za-z0-9]+)\s*\}", r"_{\1\2}"),
        (r"\^\s*\{\s*\\prime\s*\}|'", "_{prime}"),
        (r"\\text\{\s*([A-Za-z])\s*\}", r"\1"),
        (r"\\(?:p?mod|bmod)", r"\\bmod"),
        (r"(?<=\d)%", r"\\%"),
        (r"\^\\circ", ""),
        (r"\\gamma(?![A-Za-z])", r"\\text{gamma}"),  # no function
        (r"(?<![\\A-Za-z])(E(?=\s*_)|I)(?![A-Za-z])", r"\\text{\1}"),
    ]
]


@lru_cache(maxsize=4096)
def _expression(text: str) -> Any | None:
    """The expression that LaTeX gives, not evaluated; None where the parser finds none."""
    for pattern, replacement in _CLEANING:
        text = pattern.sub(replacement, text)
    try:
        value = latex2sympy(text, normalization_config=None, conversion_config=_PARSER)
        return None if isinstance(value, _NO_QUANTITIES) or value.has(sympy.nan, sympy.zoo) else _exact(value)
    except MemoryError:
        raise
    except Exception:  # the parser's own kinds, and what SymPy raises at what it built
        return None


def _exact(value: Any) -> Any:
    """Decimals as fractions, `i` as the imaginary unit, derivatives and f(x) as variables of their own."""
    if isinstance(value, sympy.MatrixBase | sympy.MatrixExpr):
        matrix = value.doit()
        return matrix.applyfunc(_exact) if isinstance(matrix, sympy.MatrixBase) else None
    opaque = value.atoms(sympy.Derivative, AppliedUndef)
    changes = {part: sympy.Symbol(str(part)) for part in opaque}
    changes |= {number: sympy.Rational(str(number)) for number in value.atoms(sympy.Float)}
    changes |= {symbol: sympy.I for symbol in value.free_symbols if symbol.name == "i"}
    return value.xreplace(changes) if changes else value
