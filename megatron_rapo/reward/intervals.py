r"""Sets of real numbers, however they are written: `[0,1)` and `0 \le x < 1`, `x \ne 2` and two intervals.

Inequalities that one answer joins by `or` are a union; by `and` or a comma what they have in common, or,
where that is nothing, a union, which is then what was meant.
"""

from __future__ import annotations

import re
from itertools import pairwise

import sympy

from megatron_rapo.reward.quantity import Quantity
from megatron_rapo.reward.reading import Answer, Group, Relation, Words


def same_set(gold: Answer, answer: Answer) -> bool:
    """Whether both are the same set of real numbers: intervals, unions, inequalities in one variable."""
    names = {name for one in (gold, answer) for name in _variables(one)}
    if len(names) > 1:
        return False
    one, other = _set(gold), _set(answer)
    return one is not None and other is not None and bool(one == other)


def _variables(answer: Answer) -> set[str]:
    if isinstance(answer, Relation):
        return {name for side in answer.sides if isinstance(side, Quantity) for name in side.symbols}
    if isinstance(answer, Group):
        return {name for item in answer.items for name in _variables(item)}
    return set()


_BRACKETS = {"()": (True, True), "[]": (False, False), "[)": (False, True), "(]": (True, False)}


def _set(answer: Answer) -> sympy.Set | None:
    try:
        return _real_set(answer)
    except (TypeError, ValueError, NotImplementedError, ArithmeticError, AttributeError):
        return None


def _real_set(answer: Answer) -> sympy.Set | None:
    if isinstance(answer, Relation):
        return _solutions(answer)
    if isinstance(answer, Words):
        return sympy.S.Reals if re.sub(r"[{}\s]", "", answer.text) == "\\mathbbR" else None
    if not isinstance(answer, Group):
        return None
    if answer.kind in _BRACKETS and len(answer.items) == 2:
        low, high = (_bound(item) for item in answer.items)
        if low is None or high is None or not low < high:
            return None
        return sympy.Interval(low, high, *_BRACKETS[answer.kind])
    if answer.kind == "{}":
        members = [_bound(item) for item in answer.items]
        return None if None in members else sympy.FiniteSet(*members)
    parts = [_set(item) for item in answer.items]
    if None in parts:
        return None
    if answer.kind == "\\cup":
        return sympy.Union(*parts)
    if answer.kind == "\\setminus":
        return sympy.Complement(parts[0], sympy.Union(*parts[1:]))
    if answer.kind == "," and answer.items and all(isinstance(item, Relation) for item in answer.items):
        both = sympy.Intersection(*parts)
        return sympy.Union(*parts) if "\\lor" in answer.text or both.is_empty else both
    return None


def _bound(item: Answer) -> sympy.Expr | None:
    if not isinstance(item, Quantity) or item.symbols or isinstance(item.value, sympy.MatrixBase):
        return None
    return item.value.doit()


_RELATIONS = {
    "<": sympy.StrictLessThan,
    ">": sympy.StrictGreaterThan,
    "\\le": sympy.LessThan,
    "\\ge": sympy.GreaterThan,
}


def _solutions(relation: Relation) -> sympy.Set | None:
    """The real solutions of a chain of inequalities in one variable."""
    sides = relation.sides
    given = [side.value for side in sides if isinstance(side, Quantity)]
    symbols = {symbol for value in given for symbol in value.free_symbols}
    if len(symbols) != 1 or len(given) != len(sides):
        return None
    (symbol,) = symbols
    real = sympy.Symbol("x", real=True)
    values = [value.subs(symbol, real).doit() for value in given]
    found: sympy.Set = sympy.S.Reals
    for (left, right), sign in zip(pairwise(values), relation.operators, strict=True):
        if sign == "\\ne":
            found = found - sympy.Eq(left, right).as_set()
        elif sign in _RELATIONS:
            found = found & _RELATIONS[sign](left, right).as_set()
        else:
            return None
    return found
