r"""What may stand beside a number: a unit, a percent sign, degrees, an ordinal's ending, a modulus.

| written | the number | beside it |
|---|---|---|
| `36 cm^2`, `36\text{ cm}^2`, `36\text{ square centimeters}` | `36` | `cm^2` |
| `50 km/h`, `50\ \frac{\text{km}}{\text{h}}` | `50` | `km/h` |
| `4\text{ different ways}`, `36 apples` | `4`, `36` | the words |
| `\$32`, `32\text{ dollars}` | `32` | `dollar` |
| `60^\circ`, `60\text{ degrees}`, `12\text{th}` | `60`, `12` | nothing |
| `12\%`, `12 percent` | `12` | a percent sign |
| `5 \pmod 7`, `5 (mod 7)` | `5` | the modulus 7 |

Words without `\text` are a unit only after a plain number, fraction or root, and single letters only those of
common units: `2 xy` is a product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MODULUS = re.compile(
    r"\s*(?:\\[pb]?mod\s*\{?\s*(\d+)\s*\}?|(?:\\text\{\s*)?\(?\s*(?:\\text\{\s*\(?\s*mod\s*\}|\\[pb]?mod|(?<![A-Za-z\\])mod)"
    r"\s*\{?\s*(\d+)\s*\}?\s*\)?\s*\}?)\s*$"
)
_PERCENT = re.compile(r"\s*(?:%|\\text\{\s*(?:%|percent|per cent|pct)\s*\}|percent|per cent|pct)\s*$")
_DEGREES = re.compile(r"\s*(?:\^\\circ\s*(?:[CFK]\b)?|\\text\{\s*degrees?\s*\}|degrees?)\s*$")
_ORDINAL = re.compile(r"(?<=\d)\s*(?:\^?\s*\{?\s*\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|(?:st|nd|rd|th))\s*$")
_FRACTION = re.compile(
    r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}([\^{}\d]*)\}\s*\{\s*\\text\s*\{([^{}]*)\}([\^{}\d]*)\}"
)

_POWER = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
_WORD = r"(?:\\text\s*\{[^{}\d]*\}|(?<![\\A-Za-z_{^])[A-Za-zµμ]{2,}(?![A-Za-z{(]))"
_LETTER = r"(?<![\\A-Za-z_{^])[A-Za-z](?![A-Za-z{(])"
_UNIT = re.compile(
    rf"(?P<rest>.*?[\d)}}A-Za-z])(?P<unit>(?:(?:\s*{_WORD}|(?<=[\d}}])\s[msghLJNWV](?![A-Za-z{{(_])){_POWER})"
    rf"(?:(?:\s*/\s*|\s*\\cdot\s*|\s+)(?:{_WORD}|{_LETTER}){_POWER})*\.?)"
)
_NUMBER = re.compile(r"[-+\d.,\s/]*\d|.*(?:\\frac|\\sqrt|\^).*\}|.*\\pi\s*", re.DOTALL)

_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "max", "gcd", "lcm", "det"}
_FUNCTIONS |= {"mod", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "arg", "dim", "lim", "sup", "inf"}

_NAMES = {
    "mm": ("millimeter", "millimetre"),
    "cm": ("centimeter", "centimetre"),
    "m": ("meter", "metre"),
    "km": ("kilometer", "kilometre"),
    "in": ("inch",),
    "ft": ("foot", "feet"),
    "yd": ("yard",),
    "mi": ("mile",),
    "mg": ("milligram",),
    "g": ("gram",),
    "kg": ("kilogram",),
    "lb": ("pound",),
    "oz": ("ounce",),
    "s": ("sec", "second"),
    "min": ("minute",),
    "h": ("hr", "hour"),
    "day": (),
    "week": (),
    "month": (),
    "yr": ("year",),
    "mL": ("ml", "milliliter", "millilitre"),
    "L": ("liter", "litre"),
    "gal": ("gallon",),
    "dollar": ("usd", "buck"),
    "cent": (),
    "mph": (),
}
_CANONICAL = {name: unit for unit, names in _NAMES.items() for name in (unit, *names)}
_POWERS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_OTHERS = {
    "unit",
    "kmh",
    "kmph",
    "rad",
    "radian",
    "Hz",
    "kHz",
    "MHz",
    "GHz",
    "eV",
    "keV",
    "MeV",
    "GeV",
    "kJ",
    "kW",
}
_OTHERS |= {
    "mW",
    "cal",
    "kcal",
    "atm",
    "Pa",
    "kPa",
    "mol",
    "amu",
    "erg",
    "dyne",
    "rpm",
    "per",
    "of",
    "deg",
    "way",
    "pm",
    "nm",
}


@dataclass(frozen=True)
class Beside:
    """What stood beside a number: `unit` in its short name, or as written, or empty."""

    unit: str = ""
    percent: bool = False
    modulus: int | None = None


def separate(text: str) -> tuple[str, Beside]:
    """A quantity's text in plain LaTeX without what stands beside it, and that."""
    modulus = None
    if found := _MODULUS.search(text):
        modulus = int(found[1] or found[2])
        text = text[: found.start()]
    text, dollars = text.replace("\\$", ""), "\\$" in text
    number = _PERCENT.sub("", text)
    percent = number != text
    number = _ORDINAL.sub("", _DEGREES.sub("", number)).strip()
    number, unit = _without_unit(_FRACTION.sub(r" \\text{\1}\2/\\text{\3}\4", number))
    return number, Beside(unit or ("dollar" if dollars else ""), percent, modulus)


def conflict(one: str, other: str) -> bool:
    """Whether two units are known and measure, or count, something else."""
    return one != other and _measures(one) and _measures(other)


def _measures(unit: str) -> bool:
    words = re.findall(r"[A-Za-z]+", unit)
    return bool(words) and all(word in _NAMES for word in words)


def _without_unit(text: str) -> tuple[str, str]:
    found = _UNIT.fullmatch(text)
    if found is None:
        return text, ""
    rest, unit = found["rest"].strip(), found["unit"].strip()
    words = re.findall(r"[A-Za-z]+", unit.replace("\\text", ""))
    named = "\\text" in unit or (_NUMBER.fullmatch(rest) and all(map(_is_unit, words)))
    if not words or not named or _FUNCTIONS.intersection(words) or rest.count("{") != rest.count("}"):
        return text, ""
    return _DEGREES.sub("", rest), _short(unit)


def _is_unit(word: str) -> bool:
    """Whether a word without `\\text` is a unit, or too long for a product of variables."""
    known = _CANONICAL.keys() | _OTHERS | _POWERS.keys()
    return len(word) == 1 or len(word) > 3 or word in known or word.removesuffix("s") in known


def _short(unit: str) -> str:
    """A unit in short names: `square centimeters` is `cm^2`."""
    text = re.sub(r"\\text|\\cdot|[{}.]", " ", unit)
    words = re.sub(r"\s*([\^/])\s*", r"\1", text).split()
    raised = next((_POWERS[word] for word in words if word in _POWERS), "")
    named = [re.sub(r"[A-Za-z]+", _canonical, word) for word in words if word not in _POWERS]
    return " ".join(named) + raised


def _canonical(word: re.Match[str]) -> str:
    lower = word[0].lower()
    for name in (word[0], lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if name in _CANONICAL:
            return _CANONICAL[name]
    return word[0]
