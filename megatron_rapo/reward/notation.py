r"""One spelling for each sign of an answer: unicode, plain text and LaTeX's variants become plain LaTeX.

| written | read as |
|---|---|
| `√2`, `2½`, `x²`, `x₁`, `∞`, `−`, `–`, `×`, `·`, `÷`, `π`, `≤`, `∪` | LaTeX's command for it |
| digits of other scripts | `0` … `9` |
| `\dfrac34`, `\sqrt3`, `sqrt(3)`, `x**2`, `10^-7`, `pi`, `<=` | `\frac{3}{4}`, `\sqrt{3}`, `x^{2}`, … |
| `\mathrm{…}`, `\textbf{…}`, `\mbox{…}` | `\text{…}` |
| `\left(`, `\big)`, `\!`, `\displaystyle`, `$`, `\(`, `**` | nothing |
| `\,`, `~`, `\quad`, `\ ` | a space |
| `,`, `and`, `\text{ and }`, `\land`; `or`, `\lor` | `,`; `\lor` |
| `10,000`, `10{,}000`, `10\,000`, `10~000`, `10 000` | `10000` |
| `0.\overline{3}`, `0.\bar{3}`, `0.333\ldots` | `\frac{1}{3}` |
"""

from __future__ import annotations

import re
import sys
import unicodedata
from fractions import Fraction

_DIGITS = {
    code: str(unicodedata.decimal(chr(code)))
    for code in range(sys.maxunicode + 1)
    if chr(code).isdecimal() and not chr(code).isascii()
}
"""Decimal digits of all scripts: LaTeX's lexer takes them for digits, SymPy cannot read them."""

_VULGAR = {
    code: " \\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", chr(code)).split("⁄"))
    for code in [0xBC, 0xBD, 0xBE, *range(0x2150, 0x215F)]
}

_SIGNS = {
    **dict.fromkeys("−–—‒﹣－", "-"),
    **dict.fromkeys("×✕⨯", r" \times "),
    **dict.fromkeys("·⋅∙•", r" \cdot "),
    **dict.fromkeys("÷∕⁄／", "/"),
    "π": r"\pi ",
    "∞": r"\infty ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": r"\equiv ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "⌀": r"\emptyset ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "∖": r"\setminus ",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "⟨": "(",
    "⟩": ")",
    "（": "(",
    "）": ")",
    "，": ",",
    "：": ":",
    "；": ";",
    "．": ".",
    "＝": "=",
    "＋": "+",
    "％": "%",
    "、": ",",
    "。": ".",
    "…": r"\ldots ",
    "′": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "₹": "",
    "€": "",
    "£": "",
    "¥": "",
    "¢": r"\text{ cents}",
    "￥": "",
    "＜": "<",
    "＞": ">",
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u202a\u202c\u202e\u2061\u2062", ""),
    "α": r"\alpha ",
    "β": r"\beta ",
    "γ": r"\gamma ",
    "δ": r"\delta ",
    "θ": r"\theta ",
    "λ": r"\lambda ",
    "μ": r"\mu ",
    "σ": r"\sigma ",
    "φ": r"\phi ",
    "ω": r"\omega ",
    "τ": r"\tau ",
    "ρ": r"\rho ",
    "ε": r"\epsilon ",
    "η": r"\eta ",
    "Δ": r"\Delta ",
    "Ω": r"\Omega ",
    "Σ": r"\Sigma ",
    "Γ": r"\Gamma ",
}
_CHARACTERS = {**_DIGITS, **_VULGAR, **{ord(sign): text for sign, text in _SIGNS.items()}}

_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢₓ", "0123456789+-nix")
_RAISED_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ]+")
_LOWERED_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙᵢₓ]+")

_BETWEEN = (
    r"\s*[,;]?(?:\s*\\text\s*\{{\s*[,;]?\s*{0}\s*\}}|(?<![A-Za-z\\]){0}(?![A-Za-z])"
    r"|\\(?:{1}|{2})(?![A-Za-z]))\s*"
)
_BRACED = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_TOKEN = r"(?:[0-9A-Za-z]|\\[A-Za-z]+)"
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<=[\w)])\*\*(?=[-\w(])", "^"),
        (r",\s*\\!\s*", ","),
        # What says nothing.
        (r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])\s*\.?(?=[^0-9])", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|boldmath|bf|rm|it)(?![A-Za-z])|\\!|\\hfill", ""),
        (r"(?<!\\)\$|\\[()](?![A-Za-z])|\\\[|\\\](?![A-Za-z])|\*\*\*?(?=\W|$)|(?<!\S)\*\*\*?|__", ""),
        (r"\\(?:,|;|:|>|\s|quad(?![A-Za-z])|qquad(?![A-Za-z])|thinspace|enspace|hspace\{[^{}]*\})", " "),
        (r"(?<!\\)~", " "),
        (r"\\(?:pounds|euro)(?![A-Za-z])|\\#", ""),
        # Variants of commands.
        (r"\\textdollar(?![A-Za-z])", r"\\$"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (
            r"\\(?:mathrm|mathbf|mathit|mathsf|text(?:bf|it|rm|sf|tt|normal)|mbox|hbox|boldsymbol|bold|bm)\s*\{",
            r"\\text{",
        ),
        (r"\\operatorname\*?\s*\{([A-Za-z]+)\}", r"\\\1 "),
        (r"\\text\s*\{\s*\}", " "),
        (r"\\(?:leq|leqslant)(?![A-Za-z])|<=|=<", r"\\le "),
        (r"\\(?:geq|geqslant)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|\\not\s*=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:langle|lparen)(?![A-Za-z])", "("),
        (r"\\(?:rangle|rparen)(?![A-Za-z])", ")"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\[lr]?vert(?![A-Za-z])|\\mid(?![A-Za-z])", "|"),
        (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset"),
        (r"\\(?:backslash|smallsetminus)(?![A-Za-z])", r"\\setminus"),
        (r"\\degree(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])", r"^\\circ "),
        (r"(begin|end)\{[bBV]?(?:small)?matrix\}", r"\1{pmatrix}"),
        (r"\\(?:dots|cdots|ldots|dotsc)(?![A-Za-z])|\.\.\.", r"\\ldots "),
        (r"\\ast(?![A-Za-z])", r"\\cdot "),
        (r"\\(?:divides|div)(?![A-Za-z])", "/"),
        (r"\\%", "%"),
        (r"\{\s*([,:%])\s*\}", r"\1"),
        # Plain text for commands.
        (r"(?<![\\A-Za-z])sqrt(?![A-Za-z])", r"\\sqrt"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"\*", r"\\cdot "),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        (r"(?<![A-Za-z])(sq|cu)\.", r"\1"),
        (r"~=", r"\\approx "),
        # Between several answers.
        (_BETWEEN.format("and", "land", "wedge"), ", "),
        (_BETWEEN.format("or", "lor", "vee"), r" \\lor "),
        # Arguments without braces.
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"\^\s*([-+]?\d+(?:\.\d+)?)", r"^{\1}"),
        (r"\\sqrt\s*(\[[^\]]*\])?\s*\(([^()]*)\)", r"\\sqrt\1{\2}"),
        (r"\\sqrt\s*(\[[^\]]*\])?\s*(\d+(?:\.\d+)?(?=\s*(?:$|[^\d.]))|" + _TOKEN + ")", r"\\sqrt\1{\2}"),
        (rf"\\(frac|binom)\s*({_TOKEN})\s*({_TOKEN})", r"\\\1{\2}{\3}"),
        (rf"\\(frac|binom)\s*({_TOKEN})\s*(?=\{{)", r"\\\1{\2}"),
        (rf"\\(frac|binom)\s*({_BRACED})\s*({_TOKEN})", r"\\\1\2{\3}"),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"\s+", " "),
    ]
]

_GROUPS = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:,|, ?\\!| )\d{3})+)(?![\d]|,\d| ?/)(\.\d+)?")
_REPEATING = re.compile(
    r"(?<![\d.])(\d+)\.(\d*)(?:\\(?:overline|bar|dot|overset\{\\frown\})\s*\{?(\d+)\}?)(?![\d.])"
)
_ENDLESS = re.compile(r"(?<![\d.])(\d+)\.(\d*?)(\d+?)\3{2,} ?\\ldots")
_LINE_END = "\ue000"
_TWICE_ESCAPED = re.compile(r"\\\\(?=[A-Za-z(\[,;!%])|\\\\")


def plain(text: str) -> str:
    """The text in plain LaTeX, without the signs that say nothing."""
    text = _RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(_RAISED)}}}", text)
    text = _LOWERED_RUN.sub(lambda run: f"_{{{run[0].translate(_LOWERED)}}}", text)
    text = text.translate(_CHARACTERS)
    # A line of a matrix ends in two backslashes; elsewhere they are a command's, escaped twice.
    text = text.replace("\\\\", _LINE_END) if "matrix" in text else _TWICE_ESCAPED.sub(r"\\", text)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = text.replace(_LINE_END, r"\\")
    text = _REPEATING.sub(_fraction, text)
    text = _ENDLESS.sub(_fraction, text)
    return _ungrouped(text).strip().rstrip(".,;: \\").removeprefix("=").strip()


def _fraction(number: re.Match[str]) -> str:
    """A repeating decimal as the fraction that it is."""
    whole, start, period = number[1], number[2], number[3]
    tail = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(start))
    value = Fraction(int(whole + start), 10 ** len(start)) + tail
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def _ungrouped(text: str) -> str:
    """Thousands without their separators, outside of brackets: `(1,234)` is a pair.

    Where commas also stand before a space, as in `1,234, 5`, those without one separate thousands.
    """
    if re.search(r"[(\[]|\\\{", text):
        return text
    return _GROUPS.sub(lambda match: match[1] + re.sub(r"\D", "", match[2]) + (match[3] or ""), text)
