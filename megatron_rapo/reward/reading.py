r"""What an answer says: its text in plain LaTeX (`notation`) read as one of a few forms.

| form | examples |
|---|---|
| `Quantity` | `42`, `five`, `2.5e-7`, `2 1/2`, `36 cm^2`, `12\%`, `5 \pmod 7`, `2\sqrt{3}`, a matrix |
| `Words` | `\text{Evelyn}`, `(A)`, `\text{not } 0`, and what cannot be read as mathematics |
| `Numeral` | `1011_2`, `A9_{12}` |
| `Clock` | `12:00`, `5:30 p.m.`, and ratios, which look like that |
| `Relation` | `x = 5`, `2 + 2 = 4`, `0 \le x < 1` |
| `Group` | `1, 2 and 3`, `2 \pm \sqrt{3}`, `(1,2)`, `[0,1)`, `\{1,2\}`, `(-\infty,0) \cup (1,2)` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeGuard

import sympy

from megatron_rapo.reward.notation import plain
from megatron_rapo.reward.quantity import Quantity, read_quantity


@dataclass(frozen=True)
class Words:
    """An answer that is no mathematics; compared without regard to case, spaces and final signs.

    Attributes:
        stands_for: what follows the letter of a choice, as in `(C) 25`.
    """

    text: str
    stands_for: str = ""

    @property
    def key(self) -> str:
        """What is compared."""
        bare = re.sub(r"\\text\s*|[{}\s\"'`*$]|\\(?=[^A-Za-z])", "", self.text)
        return bare.strip(".,;:!").casefold()


@dataclass(frozen=True)
class Numeral:
    """Digits in a base, as they are written: `1011_2` is not `11`, its value."""

    digits: str
    base: int


@dataclass(frozen=True)
class Clock:
    """A time of day, or a ratio."""

    parts: tuple[int, ...]
    minutes: bool  # the second part has two digits
    half: str | None  # "am" or "pm"

    @property
    def time(self) -> bool:
        """Whether it can be a time of day: two digits of minutes below 60."""
        return bool(self.half) or (
            len(self.parts) == 2 and self.parts[0] <= 24 and self.minutes and self.parts[1] < 60
        )


@dataclass(frozen=True)
class Relation:
    """`parts[0] operators[0] parts[1] …`; operators are `=`, `<`, `>`, `\\le`, `\\ge`, `\\ne`, `\\approx`."""

    text: str
    parts: tuple[str, ...]
    operators: tuple[str, ...]

    @property
    def equation(self) -> bool:
        """Whether it equates only."""
        return set(self.operators) <= {"=", "\\approx"}

    @cached_property
    def sides(self) -> tuple[Answer, ...]:
        """Its parts, read."""
        return tuple(_read(part) for part in self.parts)


@dataclass(frozen=True)
class Group:
    """Several answers.

    Attributes:
        kind: `,` a list in any order, `()`, `[)`, … in order, `{}` a set, `\\cup` and `\\setminus` of sets.
    """

    kind: str
    items: tuple[Answer, ...]
    text: str = ""


Answer = Quantity | Words | Numeral | Clock | Relation | Group

_NEGATIONS = re.compile(
    r"(?<![A-Za-z\\])(?:not|no|non|never|none|neither|nor|except|without|cannot|isn't|least|most|over|under"
    r"|more than|less than|greater than|fewer than|larger than|smaller than|above|below|between|undefined"
    r"|impossible|unknown|prime|even|odd|if|when|where)(?![A-Za-z])",
    re.IGNORECASE,
)
_OPERATORS = ("\\approx", "\\equiv", "\\in", "\\le", "\\ge", "\\ne", "=", "<", ">")
_LISTS = (",", ";", "\\lor")
_LIST = re.compile(r"[,;]|\\lor")
_SIGNS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_CLOCK = re.compile(
    r"(\d{1,6})\s*:\s*(\d{1,6})(?:\s*:\s*(\d{1,6}))?\s*(?:\\text\{)?\s*([ap]\.?\s*m\.?)?\s*\}?", re.I
)
_NUMERAL = re.compile(
    r"(-?)\s*[({]?((?:[0-9A-Za-z]|\\text\{\s*[0-9A-Z]+\s*\})+)[)}]?\s*_\s*\{?\s*(?:\\text\{[^{}]*\})?(\d+)\s*\}?"
)
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_NUMBERS = ("zero", "one", *_BASES, "eleven", "twelve")
_NUMBER_WORD = re.compile(rf"(?:\\text\s*\{{)?\s*({'|'.join(_NUMBERS)})\s*\}}?", re.IGNORECASE)
_OPEN, _CLOSE = ("(", "[", "\\{", "{"), (")", "]", "\\}", "}")
_WHOLE_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_ENGLISH = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z\d]+)*")
_CAPITALS = re.compile(r"[A-Z]{3,}")  # no product: letters of a code, vertices of a polygon
_CHOICE = re.compile(
    r"(?:\\text\s*\{)?\s*(?:\(([A-Z])\)|([A-J])\)(?=.)|([A-J])[.:](?=\s*\}?\s*[-\\\d(]))\s*\}?\s*(.*)"
)


def read(text: str) -> Answer:
    r"""The answer that a text gives: one in LaTeX or plain text, such as the content of `\boxed{…}`."""
    text = plain(text)
    word = _NUMBER_WORD.fullmatch(text)
    return _read(str(_NUMBERS.index(word[1].lower())) if word else text)


def _read(text: str) -> Answer:
    text = text.strip()
    while text.startswith("{") and _closing(text) == len(text) - 1:
        text = text[1:-1].strip()
    if whole := _WHOLE_TEXT.fullmatch(text):
        text = plain(whole[1])
        if _ENGLISH.fullmatch(text.replace("\\$", "")):
            return Words(text)
    if _CAPITALS.fullmatch(text):
        return Words(text)
    for read_form in (_choice, _several, _union, _relation, _bracketed, _clock, _numeral):
        if (answer := read_form(text)) is not None:
            return answer
    if _NEGATIONS.search(text):
        return Words(text)
    return read_quantity(text) or Words(text)


def _choice(text: str) -> Answer | None:
    """`(C)`, also where what it stands for follows; `C) 25`; `C. 25` or `C: 25` before mathematics."""
    found = _CHOICE.fullmatch(text)
    if found is None or (found[1] and found[4].startswith(("_", "^", "+", "-", "=", "("))):
        return None
    return Words(found[1] or found[2] or found[3], stands_for=found[4])


def _several(text: str) -> Group | None:
    if _LIST.search(text):
        parts, _ = _split(text, _LISTS)
        parts = _named([part for part in parts if part.strip()])
        if len(parts) > 1:
            return listed(map(_read, parts), text)
    if _SIGNS.search(text):
        plus = text.replace("\\pm", "+").replace("\\mp", "-")
        minus = text.replace("\\pm", "-").replace("\\mp", "+")
        items = (_done(_read(one.strip().removeprefix("+"))) for one in (plus, minus))
        return Group(",", tuple(items), text)
    return None


def _named(parts: list[str]) -> list[str]:
    r"""The parts of `x \ne 1, 2`, each with the name that stands before the first."""
    name, sign, _ = parts[0].partition("\\ne") if parts else ("", "", "")
    if not sign or any(operator in part for part in parts[1:] for operator in _OPERATORS):
        return parts
    return [parts[0], *(f"{name}\\ne {part}" for part in parts[1:])]


def _done(answer: Answer) -> Answer:
    """One of the two that a ± gives: 3 ± 2 is a way to write 5 and 1, not a sum left undone."""
    if isinstance(answer, Quantity):
        return replace(answer, text="")
    if isinstance(answer, Relation) and isinstance(last := answer.sides[-1], Quantity):
        value = last.value.doit()
        if isinstance(value, sympy.Rational):
            return replace(answer, parts=(*answer.parts[:-1], str(value)))
    return answer


def listed(items: Iterable[Answer], text: str = "") -> Group:
    """The items as one list; those that are lists are part of it.

    A name before the first alone, as in `x = 1, 3`, goes for all.
    """
    flat = [part for item in items for part in (item.items if _is_list(item) else (item,))]
    first, others = flat[0], flat[1:]
    if isinstance(first, Relation) and first.equation and not any(isinstance(x, Relation) for x in others):
        flat[0] = first.sides[-1]
    return Group(",", tuple(flat), text)


def _is_list(answer: Answer) -> TypeGuard[Group]:
    return isinstance(answer, Group) and answer.kind == ","


def _union(text: str) -> Group | None:
    for operator in ("\\setminus", "\\cup"):
        if operator in text:
            parts, _ = _split(text, (operator,))
            if len(parts) > 1 and not _equates(text, parts):
                return Group(operator, tuple(_read(part) for part in parts), text)
    return None


def _equates(text: str, parts: Sequence[str]) -> bool:
    r"""Whether `=` binds what `\cup` joins, as in `|A \cup B| = 5`; in `x = 1 \cup x = 2` it does not."""
    operators = set(_split(text, _OPERATORS)[1])
    return operators == {"="} and not all("=" in part for part in parts)


def _relation(text: str) -> Answer | None:
    if not any(operator in text for operator in _OPERATORS):
        return None
    parts, found = _split(text, _OPERATORS)
    if not found:
        return None
    if found == ["\\in"] or (len(parts) == 2 and not parts[0].strip()):  # x ∈ [0, 1); ≈ 5
        return _read(parts[1]) if found[0] in ("\\in", "\\approx", "=") else Words(text)
    if "\\in" in found or not all(part.strip() for part in parts):
        return Words(text)
    operators = ["=" if operator == "\\equiv" else operator for operator in found]
    return Relation(text, tuple(part.strip() for part in parts), tuple(operators))


def _bracketed(text: str) -> Answer | None:
    if text in ("\\emptyset", "\\{\\}", "\\{ \\}", "\\text{empty}"):
        return Group("{}", (), text)
    opening = next((sign for sign in ("(", "[", "\\{") if text.startswith(sign)), None)
    if opening is None or _closing(text) != len(text) - 1:
        return None
    closing = "\\}" if text.endswith("\\}") else text[-1]
    inner = text[len(opening) : -len(closing)]
    kind = opening[-1] + closing[-1]
    items = _read(inner)
    if _is_list(items):
        return Group(kind, items.items, text)
    return items if kind in ("()", "[]") else Group(kind, (items,), text)


def _clock(text: str) -> Clock | None:
    found = _CLOCK.fullmatch(text)
    if found is None:
        return None
    parts = tuple(int(part) for part in found.groups()[:3] if part is not None)
    return Clock(parts, len(found[2]) == 2, re.sub(r"[^apm]", "", found[4].lower()) if found[4] else None)


def _numeral(text: str) -> Numeral | None:
    for word, base in _BASES.items():
        text = re.sub(rf"_\s*\{{?\s*\\text\{{\s*{word}\s*\}}\s*\}}?", f"_{{{base}}}", text)
    found = _NUMERAL.fullmatch(text)
    if found is None:
        return None
    digits = re.sub(r"\\text|[{}\s]", "", found[2])
    if (not any(digit.isdigit() for digit in digits) and not digits.isupper()) or digits[0].islower():
        return None  # x_1 is a name
    if len(digits) == 1 and digits.isalpha():  # A_1, too
        return None
    return Numeral(found[1] + digits.upper(), int(found[3]))


def _split(text: str, separators: Sequence[str]) -> tuple[list[str], list[str]]:
    """The text cut at separators outside of brackets, and the separators that were found."""
    parts: list[str] = []
    found: list[str] = []
    depth, start, place = 0, 0, 0
    while place < len(text):
        opened = next((sign for sign in _OPEN if text.startswith(sign, place)), None)
        closed = next((sign for sign in _CLOSE if text.startswith(sign, place)), None)
        here = next((s for s in separators if _stands(text, s, place)), None) if depth == 0 else None
        if here is not None:
            parts.append(text[start:place])
            found.append(here)
            place += len(here)
            start = place
        elif opened or closed:
            depth = max(0, depth + (1 if opened else -1))
            place += len(opened or closed or "")
        else:
            place += 2 if text[place] == "\\" and not text[place + 1 : place + 2].isalpha() else 1
    return [*parts, text[start:]], found


def _stands(text: str, separator: str, place: int) -> bool:
    """Whether the separator is there, and no part of a longer command (`\\le` of `\\left`)."""
    if not text.startswith(separator, place):
        return False
    end = place + len(separator)
    return not (separator[0] == "\\" and separator[-1].isalpha() and text[end : end + 1].isalpha())


def _closing(text: str) -> int:
    """Where the bracket that the text begins with is closed; −1 if it is not."""
    depth, place = 0, 0
    while place < len(text):
        opened = next((sign for sign in _OPEN if text.startswith(sign, place)), None)
        closed = next((sign for sign in _CLOSE if text.startswith(sign, place)), None)
        if opened:
            depth += 1
        elif closed:
            depth -= 1
            if depth == 0:
                return place + len(closed) - 1
        place += len(opened or closed or " ")
    return -1
