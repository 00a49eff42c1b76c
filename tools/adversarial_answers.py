"""Texts that are to harm a verifier of mathematics: what a policy may write, and worse."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

COMMANDS = [
    *(r"\boxed{", r"\fbox{", r"\frac", r"\dfrac{", r"\sqrt", r"\sqrt[", r"\text{", r"\mathrm{", r"\infty"),
    *(r"\pi", r"\sum_", r"\prod_{n=1}^", r"\int_0^", r"\lim_{x \to", r"\le", r"\\", r"\left(", r"\right]"),
    *(r"\begin{pmatrix}", r"\end{cases}", r"\cup", r"\binom{", r"\overline{", r"\log_", r"\sin", r"\%"),
]
DELIMITERS = [r"\{", r"\}", "{", "}", r"\[", r"\]", "[", "]", r"\(", r"\)", "(", ")", "$", "$$", "|"]
WORDS = ["0", "1", "12", "x", "e", "i", "zoo", "nan", "oo", "answer", "final answer is", " ", "\n"]
SIGNS = [*"^_,.=<-+*/!%&;:'\"~@#?", "**", "^^", "!!", "\\"]
UNICODE = [
    "∞",
    "√",
    "½",
    "٣",
    "²",
    "−",
    "≤",
    "π",
    "\u202e",
    "\u200b",
    "\ufeff",
    "\ud7ff",
    "👩‍👩‍👧",
    "e\u0301",
]
CONTROL = [chr(code) for code in (0, 1, 7, 8, 9, 11, 12, 13, 27, 127, 0x85, 0x2028)]

pieces = st.sampled_from(COMMANDS + DELIMITERS + WORDS + SIGNS + UNICODE + CONTROL)
fragments = st.lists(pieces, max_size=24).map("".join)
digits = st.builds(
    lambda digit, count: digit * count, st.sampled_from(["9", "10", "0.1", "1,"]), st.integers(1, 20_000)
)
numbers = st.integers(-(10**30), 10**30).map(str) | digits
openings = [
    ("(", ")"),
    ("{", "}"),
    ("[", "]"),
    (r"\left(", r"\right)"),
    (r"\frac{1}{", "}"),
    (r"\sqrt{", "}"),
]
openings += [("2^{", "}"), ("|", "|"), ("-", ""), (r"\text{", "}"), (r"\boxed{", "}"), ("x_{", "}")]
nestings = st.builds(
    lambda around, depth, inside, missing: around[0] * depth + inside + around[1] * max(0, depth - missing),
    st.sampled_from(openings),
    st.integers(1, 2000),
    fragments,
    st.integers(0, 3),
)
towers = st.builds(
    lambda bases, sign: sign.join(bases) + "}" * (len(bases) - 1) * sign.endswith("{"),
    st.lists(st.sampled_from(["9", "10", "99999", "1e999", "x", "(-1)", "0"]), min_size=2, max_size=8),
    st.sampled_from(["^{", "**", "^", "e", "!^"]),
)
factorials = st.builds(
    lambda number, signs: f"({number}){'!' * signs}", st.integers(0, 10**12), st.integers(1, 5)
)
free = st.text(max_size=60)
# Towers and factorials are few: most run into the time limit, and cost a process.
usual = st.one_of(fragments, fragments, free, numbers, nestings)
bodies = st.one_of(*[usual] * 9, towers, factorials)


def _framed(body: str, frame: tuple[str, str]) -> str:
    return f"{frame[0]}{body}{frame[1]}"


frames = [
    ("", ""),
    (r"\boxed{", "}"),
    (r"\boxed{", ""),
    ("$", "$"),
    (r"\[ ", r" \]"),
    ("The final answer is ", "."),
]
frames += [
    (r"\boxed{1} \boxed{", "}"),
    (r"\boxed{x = ", "}"),
    (r"\boxed{\{", r"\}}"),
    ("<think>", r"\boxed"),
    ("#### ", ""),
]
texts = st.builds(_framed, bodies, st.sampled_from(frames))


def adversarial_answers(count: int) -> list[str]:
    """`count` different texts, the same ones each time."""
    found: dict[str, None] = {}

    @seed(0)
    @settings(
        max_examples=2 * count,  # some come twice
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(texts)
    def collect(text: str) -> None:
        found.setdefault(text)

    collect()
    if len(found) < count:
        raise RuntimeError(f"hypothesis made {len(found)} different texts instead of {count}")
    return list(found)[:count]
