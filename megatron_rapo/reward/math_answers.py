r"""The `math` verifier: a response's final answer against a gold answer, by math-verify.

Imported in verifier processes only: SymPy can hang or eat memory on what a policy writes.
"""

from __future__ import annotations

import logging
import re
import sys
import unicodedata
from functools import lru_cache
from typing import Any

import sympy.core.random
from math_verify import parse, verify

RESPONSE_TAIL = 4096
"""Characters at a response's end in which its final answer must stand; bounds the extraction's time."""

_DIGITS = {
    code: str(unicodedata.decimal(chr(code)))
    for code in range(sys.maxunicode + 1)
    if chr(code).isdecimal() and not chr(code).isascii()
}
"""Decimal digits of all scripts: LaTeX's lexer takes them for digits, SymPy cannot read them."""

_INTEGER = re.compile(r"-?[0-9]{1,100}")

# math-verify warns that its own time limits are off. They are: this process is killed instead, which also
# ends what a signal handler cannot interrupt, such as one long multiplication of big integers.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def is_correct(response: str, answer: str) -> bool:
    r"""Whether the response's final answer equals the gold answer.

    The final answer is the last `\boxed{…}` or "final answer is …", else an expression after "answer", else
    the last expression or number. Boxes close together are one list, as math-verify reads them. An answer
    that is no mathematics (a name, `(A)`) is compared as text.

    Args:
        response: any text; its last `RESPONSE_TAIL` characters count.
        answer: LaTeX or plain, such as `\frac{3}{4}`, `(1,2)`, `10,000`, `12\%`.

    Raises:
        ValueError: there is nothing to compare with in `answer`.
        Exception: whatever SymPy raises where it cannot compare the two.
    """
    gold = _parse_gold(answer)
    predicted = _parse_tail(response[-RESPONSE_TAIL:])
    if _is_integer(gold) and _is_integer(predicted):
        return int(gold[-1]) == int(predicted[-1])  # SymPy would simplify their difference, at length
    # SymPy tries some equalities at random points; seeded, the same two texts always compare the same.
    sympy.core.random.seed(0)
    # A parse is [expression, text]. Reversed, equal texts are found first, before any algebra.
    return verify(gold[::-1], predicted[::-1], timeout_seconds=None, raise_on_error=True)


def final_answer(response: str) -> str | None:
    """The response's final answer as text, by the same rules; None where there is none."""
    found = _parse_tail(response[-RESPONSE_TAIL:])
    return str(found[-1]) if found else None


@lru_cache(maxsize=1)  # of the response that was just verified
def _parse_tail(text: str) -> list[Any]:
    return _parse(text)


@lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> list[Any]:
    gold = _parse(f"\\boxed{{{answer}}}")
    if not gold:
        raise ValueError(f"the gold answer {answer!r} holds nothing to compare with")
    return gold


def _is_integer(found: list[Any]) -> bool:
    """Whether the answer is written as plain digits."""
    return bool(found) and isinstance(found[-1], str) and _INTEGER.fullmatch(found[-1]) is not None


def _parse(text: str) -> list[Any]:
    r"""The text's final answer: the SymPy expression, if it is one, and the text it was read from.

    `first_match`: what does not parse is not replaced by another number from the text. Without it the gold
    answer `2007 + \frac\pi 2`, on whose LaTeX math-verify fails, would be 2.
    """
    text = text.translate(_DIGITS)
    found = parse(text, extraction_mode="first_match", parsing_timeout=None, raise_on_error=True)
    source = found[-1] if found else None
    if isinstance(source, str) and source.endswith("."):  # a sentence's; LaTeX does not parse with it
        found = _parse(f"\\boxed{{{source.rstrip('.')}}}") + found
    return found
