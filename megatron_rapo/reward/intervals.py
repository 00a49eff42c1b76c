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
    """None where it is no set of real numbers."""
    try:
        return _real_set(answer)
    except (TypeError, ValueError, NotImplementedError, ArithmeticError, AttributeError):
        return None


def _real_set(answer: Answer) -> sympy.Set:
    if isinstance(answer, Relation):
        return _solutions(answer)
    if isinstance(answer, Words) and re.sub(r"[{}\s]", "", answer.text) == "\\mathbbR":
        return sympy.S.Reals
    if not isinstance(answer, Group):
        raise ValueError("no set")
    if answer.kind in _BRACKETS and len(answer.items) == 2:
        low, high = (_value(item) for item in answer.items)
        if not low < high:
            raise ValueError("no interval")
        return sympy.Interval(low, high, *_BRACKETS[answer.kind])
    if answer.kind == "{}":
        return sympy.FiniteSet(*map(_value, answer.items))
    parts = [_real_set(item) for item in answer.items]
    if answer.kind == "\\cup":
        return sympy.Union(*parts)
    if answer.kind == "\\setminus":
        return sympy.Complement(parts[0], sympy.Union(*parts[1:]))
    if answer.kind == "," and all(isinstance(item, Relation) for item in answer.items):
        both = sympy.Intersection(*parts)
        return sympy.Union(*parts) if "\\lor" in answer.text or both.is_empty else both
    raise ValueError("a list")


def _value(item: Answer) -> sympy.Expr:
    if not isinstance(item, Quantity):
        raise ValueError("no number")
    return item.value.doit()


_RELATIONS = {
    "<": sympy.StrictLessThan,
    ">": sympy.StrictGreaterThan,
    "\\le": sympy.LessThan,
    "\\ge": sympy.GreaterThan,
    "\\ne": sympy.Unequality,
}


def _solutions(relation: Relation) -> sympy.Set:
    """The real solutions of a chain of inequalities in one variable."""
    values = [_value(side) for side in relation.sides]
    if len({symbol for value in values for symbol in value.free_symbols}) != 1:
        raise ValueError("not in one variable")
    found: sympy.Set = sympy.S.Reals
    for (left, right), sign in zip(pairwise(values), relation.operators, strict=True):
        if sign not in _RELATIONS:
            raise ValueError("an equation")
        found = found & _RELATIONS[sign](left, right).as_set()
    return found
