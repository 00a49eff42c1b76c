r"""Whether an answer says what the gold says, as a mathematician marks it.

| gold | right | wrong |
|---|---|---|
| `277` | `n = 277`, `277\%`, `5 + 272 = 277` | `278 = 277`, `277_7`, `270 + 7` |
| `x = 2` | `2`, `x = 2`, `2 = x` | `y = 2` |
| `2x + y = 3` | `y = 3 - 2x`, `4x + 2y = 6` | `2x + y = 4` |
| `1, 3` in any order | `3, 1`, `\{1, 3\}`, `(1, 3)`, `2 \pm 1`, `x = 1` or `x = 3` | `1, 3, 3`, `1` |
| `(1, 3)` in this order | `1, 3`; as an interval `1 < x < 3` | `(3, 1)`, `\{1, 3\}`, `[1, 3]` |
| `[0, 1)` | `0 \le x < 1` | `(0, 1]` |
| `x \ne 2` | `(-\infty, 2) \cup (2, \infty)`, `x < 2` or `x > 2` | `x < 2` |
| `12\%` | `12\%`, `12`, `0.12` | `0.12\%` |
| `5 \pmod 7` | `5`, `12 \pmod 7` | `5 \pmod 8` |
| `36\text{ cm}^2` | `36`, `36 cm^2`, `36\text{ square centimeters}` | `36\text{ m}^2` |
| `1011_2` | `1011`, `(1011)_{2}` | `1011_3`, `11` |
| `12:00` | `12:00` | `1:00` |
| `x \ne 1, 2` | `x \ne 1, x \ne 2` | `x \ne 1` |
| `\text{(A)}` | `A`, `a`, `(A) 25`, `A) 25` | `B`, `B) 25` |
| `25` | `(A) 25`, `A) 25` | `(A) 26`, `A` |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import sympy

from megatron_rapo.reward.intervals import same_set
from megatron_rapo.reward.quantity import Quantity
from megatron_rapo.reward.reading import Answer, Clock, Group, Numeral, Relation, Words, read
from megatron_rapo.reward.units import conflict
from megatron_rapo.reward.values import restates, same_value

_PERCENT = sympy.Rational(1, 100)
_IN_ORDER = ("()", "[]", "[)", "(]")
_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_NAME = re.compile(
    r"(?:\\[A-Za-z]+|[A-Za-z])(?:\s*_\s*(?:\{[^{}]*\}|\w))?'*(?:\s*\([A-Za-z](?:\s*,\s*[A-Za-z])*\))?"
    r"|[A-Z](?:\s*\\(?:cup|cap|setminus)\s*[A-Z])+"
    r"|\\text\{[^{}]*\}"
)
_CONSTANTS = ("\\pi", "e", "i", "\\infty")


def same(gold: Answer, answer: Answer) -> bool:
    """Whether the answer is right; the gold decides what is exact and what is in order."""
    if any(isinstance(one, Words) and one.stands_for for one in (gold, answer)):
        return _same_choice(gold, answer)
    if isinstance(answer, Relation) or isinstance(gold, Relation):
        return _same_relation(gold, answer)
    if isinstance(gold, Group) and isinstance(answer, Group):
        return _same_groups(gold, answer)
    if isinstance(gold, Group):
        return _one_for_group(gold, answer, lambda item: same(item, answer))
    if isinstance(answer, Group):
        return _one_for_group(answer, gold, lambda item: same(gold, item))
    if isinstance(gold, Quantity) and isinstance(answer, Quantity):
        return _same_quantity(gold, answer)
    if isinstance(gold, Clock):
        return _same_clock(gold, answer)
    if isinstance(answer, Clock):
        return _same_clock(answer, gold)
    if isinstance(gold, Numeral):
        return gold == answer or (isinstance(answer, Quantity) and answer.text.upper() == gold.digits)
    if isinstance(answer, Numeral):
        digits = read(answer.digits)
        return answer.base == 10 and isinstance(digits, Quantity) and same(gold, digits)
    return _same_words(gold, answer)


def _same_choice(gold: Answer, answer: Answer) -> bool:
    """Compares letters where both have them; else what has none may be the letter, or what it stands for."""
    letters = [one.text for one in (gold, answer) if isinstance(one, Words) and one.stands_for]
    if len(letters) == 2:
        return letters[0] == letters[1]
    return any(same(one, other) for one in _senses(gold) for other in _senses(answer))


def _senses(answer: Answer) -> list[Answer]:
    if isinstance(answer, Words) and answer.stands_for:
        return [Words(answer.text), read(answer.stands_for)]
    return [answer]


def _same_words(gold: Quantity | Words, answer: Quantity | Words) -> bool:
    """Compares as text. `A` reads as a variable and `Yes` as a product, where the other side is words."""
    key = Words(gold.text).key
    return key == Words(answer.text).key and (isinstance(gold, Words) or len(key) == 1)


def _same_quantity(gold: Quantity, answer: Quantity) -> bool:
    one, other = gold.beside, answer.beside
    if conflict(one.unit, other.unit) or restates(gold, answer):
        return False
    if one.modulus and other.modulus:
        return one.modulus == other.modulus and _congruent(gold, answer, one.modulus)
    if same_value(gold, answer) or _same_letters(gold, answer):
        return True
    if one.percent == other.percent:
        return False
    if one.percent:
        return same_value(gold.scaled(_PERCENT), answer)
    return same_value(gold, answer.scaled(_PERCENT))


def _congruent(gold: Quantity, answer: Quantity, modulus: int) -> bool:
    if not (gold.number and answer.number):
        return same_value(gold, answer)
    return bool((gold.value - answer.value) % modulus == 0)


def _same_letters(gold: Quantity, answer: Quantity) -> bool:
    """Whether only case differs in a choice's letter, or in a word, which LaTeX takes for a product."""
    key = Words(gold.text).key
    tolerant = gold.text.strip() in ("A", "B", "C", "D", "E") or len(key) > 3
    return tolerant and key.isalpha() and key == Words(answer.text).key


def _same_clock(clock: Clock, other: Answer) -> bool:
    """Whether times or ratios are the same; a ratio of two numbers may be a fraction."""
    if isinstance(other, Clock):
        if clock.half and other.half and clock.half != other.half:
            return False
        ratios = not (clock.time or other.time)
        return clock.parts == other.parts or (ratios and _in_proportion(clock.parts, other.parts))
    if not isinstance(other, Quantity) or len(clock.parts) != 2:
        return False
    return other.number and bool(sympy.Rational(*clock.parts) == other.value)


def _in_proportion(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) == len(other) and all(
        a * other[-1] == b * one[-1] for a, b in zip(one, other, strict=True)
    )


# Lists, tuples and sets.


def _one_for_group(group: Group, single: Answer, right: Callable[[Answer], bool]) -> bool:
    """Whether a group and a single answer are the same, by whether its items are."""
    if isinstance(single, Quantity) and _matrix(single):
        return group.kind in ("()", "[]") and _same_vector(single.value, group)
    if isinstance(single, Words):
        return same_set(group, single)
    if group.kind == "{}":  # {5} for 5
        return len(group.items) == 1 and right(group.items[0])
    return group.kind == "," and all(map(right, group.items))  # 5/2 or 2.5: one value in two spellings


def _same_vector(matrix: sympy.MatrixBase, group: Group) -> bool:
    if 1 not in matrix.shape or len(matrix) != len(group.items):
        return False
    entries = (Quantity(str(entry), entry) for entry in matrix.flat())
    return all(map(same, entries, group.items))


def _same_groups(gold: Group, answer: Group) -> bool:
    if gold.kind in _IN_ORDER:
        alike = answer.kind == gold.kind or (gold.kind, answer.kind) == ("()", ",")
        return (alike and _same_in_order(gold.items, answer.items)) or same_set(gold, answer)
    if gold.kind == "{}":
        if answer.kind == "{}" and _same_members(gold.items, answer.items):
            return True
        return answer.kind in ("{}", ",") and _same_in_any_order(gold.items, answer.items)
    if gold.kind == ",":
        if len(set(_labels(gold.items))) > 1 and None in _labels(answer.items):
            return _same_in_order(gold.items, answer.items)  # AB = 1, CD = 2, for which 2, 1 is wrong
        listed = answer.kind in (",", "{}", "()") and _same_in_any_order(gold.items, answer.items)
        return listed or same_set(gold, answer)
    alike = gold.kind == answer.kind and _same_in_any_order(gold.items, answer.items)
    return alike or same_set(gold, answer)


def _labels(items: Sequence[Answer]) -> list[str | None]:
    return [item.parts[0] if isinstance(item, Relation) and item.equation else None for item in items]


def _same_in_order(golds: Sequence[Answer], answers: Sequence[Answer]) -> bool:
    return len(golds) == len(answers) and all(map(same, golds, answers))


def _same_in_any_order(golds: Sequence[Answer], answers: Sequence[Answer]) -> bool:
    """Whether the items can be paired, each with one of its own."""
    if len(golds) != len(answers):
        return False
    left = list(answers)
    for gold in golds:
        place = next((place for place, answer in enumerate(left) if same(gold, answer)), None)
        if place is None:
            return False
        del left[place]
    return True


def _same_members(golds: Sequence[Answer], answers: Sequence[Answer]) -> bool:
    """Whether two sets have the same members, however often each is written."""
    return all(any(same(gold, answer) for answer in answers) for gold in golds) and all(
        any(same(gold, answer) for gold in golds) for answer in answers
    )


# Equations and inequalities.


def _same_relation(gold: Answer, answer: Answer) -> bool:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        if gold.equation and answer.equation:
            return _same_equation(gold, answer)
        return _same_sides(gold, answer) or same_set(gold, answer)
    if isinstance(answer, Relation) and answer.equation:
        return any(same(gold, value) for value in _stated(answer))
    if isinstance(gold, Relation) and gold.equation:
        return not _implicit(gold) and any(same(value, answer) for value in _stated(gold))
    return same_set(gold, answer)


def _same_equation(gold: Relation, answer: Relation) -> bool:
    name, left, right = _name(gold.parts[0]), _name(answer.parts[0]), _name(answer.parts[-1])
    if name and left:
        values = _stated(answer)
        return name == left and any(same(one, other) for one in _stated(gold) for other in values)
    if name and right:
        return name == right and same(gold.sides[-1], answer.sides[0])
    return _same_sides(gold, answer) or _multiples(gold, answer)


def _implicit(gold: Relation) -> bool:
    """Whether an equation is the answer, and states no value: `2x + y = 3z`, `x^2 + y^2 = 4`."""
    left, right = gold.sides[0], gold.sides[-1]
    if _name(gold.parts[0]) or _name(gold.parts[-1]):
        return False
    if not isinstance(right, Quantity) or not _constant(right):
        return True
    symbols = left.symbols if isinstance(left, Quantity) else frozenset()
    return len(symbols & {"x", "y", "z"}) > 1 or (bool(symbols) and right.text == "0")


def _same_sides(gold: Relation, answer: Relation) -> bool:
    """The same relation, or the same one read from its other end."""
    if gold.operators == answer.operators and _same_in_order(gold.sides, answer.sides):
        return True
    turned = tuple(_TURNED.get(sign, sign) for sign in answer.operators[::-1])
    return gold.operators == turned and _same_in_order(gold.sides, answer.sides[::-1])


def _multiples(gold: Relation, answer: Relation) -> bool:
    """Whether two equations have the same solutions, since one is a multiple of the other."""
    sides = (*gold.sides, *answer.sides)
    values = [side.value for side in sides if isinstance(side, Quantity) and not _matrix(side)]
    if not len(sides) == len(values) == 4:
        return False
    a, b, c, d = values
    one, other = sympy.expand(a - b), sympy.expand(c - d)
    if not one.free_symbols:
        return False
    factor = sympy.cancel(one / other)
    return not factor.free_symbols and factor != 0


def _stated(relation: Relation) -> list[Answer]:
    """The values that a chain of equations states for what it names; none where it contradicts itself."""
    sides, parts = relation.sides, relation.parts
    constants = [
        side
        for side, part in zip(sides, parts, strict=True)
        if isinstance(side, Quantity) and _constant(side) and not _name(part)
    ]
    if not all(_agree(one, other) for one, other in pairwise(constants)):
        return []
    if "\\approx" in relation.operators:
        place = relation.operators.index("\\approx")
        exact = [] if _name(parts[place]) else [sides[place]]
        return [*exact, sides[-1]]
    if len(sides) == 2 and _name(parts[1]) and not _name(parts[0]):
        return [sides[0]] if _constant(sides[0]) else [sides[1], sides[0]]
    return [sides[-1]]


def _agree(one: Quantity, other: Quantity) -> bool:
    """Whether two values of a chain are equal; a decimal may be rounded."""
    if same_value(one, other) or one.beside.percent != other.beside.percent:
        return True
    precise, rounded = (one, other) if one.ulp is None or (other.ulp or 0) > one.ulp else (other, one)
    if rounded.ulp is None:
        return False
    difference = precise.value - rounded.value
    if not isinstance(difference, sympy.Rational):
        difference = difference.evalf(30)
    return bool(difference.is_real and abs(difference) < rounded.ulp)


def _constant(side: Answer) -> bool:
    return isinstance(side, Quantity) and not side.symbols and not _matrix(side)


def _matrix(quantity: Quantity) -> bool:
    return isinstance(quantity.value, sympy.MatrixBase)


def _name(text: str) -> str | None:
    """The text without spaces if it is a name: `x`, `m_{\\max}`, `f(x)`, `\\theta`."""
    text = re.sub(r"[\s{}]", "", text) if _NAME.fullmatch(text.strip()) else ""
    return text if text and text not in _CONSTANTS else None
