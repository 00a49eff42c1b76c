r"""Which part of a response is its final answer.

1. The last `\boxed{…}` or `\fbox{…}`. Boxes with nothing but `,`, `and` or `or` (and a name's `x =`) between
   them are one list. A last box that is empty, or not closed, is no answer, and no earlier one stands in.
2. What follows the last "answer is", "answer:" or "answer =": the sentence's mathematics, what is emphasised
   (`**Evelyn Brown** (of 3)`), its number, or its words. "The answer is not 5." gives none. After a box only
   "final answer …" before mathematics counts.
3. The last expression in `$…$`, `\(…\)`, `\[…\]`, or the last number outside of them.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*")
_BARE = re.compile(r"-?\d+(?:\.\d+)?|[A-Za-z]")
_BETWEEN_BOXES = re.compile(
    r"(?:[\s$,;.]|\\[()\[\]]|\\[,;:! ]|\\q?quad|\\text\{\s*,?\s*(?:and|or)?\s*\}|(?:and|or)(?![A-Za-z])"
    r"|\\?[A-Za-z](?:_\{?\w+\}?)?\s*=)*"
)
_SEPARATOR = re.compile(r"[,;]|(?:and|or)(?![A-Za-z])")
_SENTENCE_END = re.compile(r"\.\s*[$)\]]?\s|\.\s*$")

_VERB = (
    r"(?:is|are|was|equals|=|(?:must|should|would|could|can|may|will)(?:\s+not)?\s+be"
    r"|cannot\s+be|\w+n['’]t(?:\s+be)?)"
)
_PHRASE = re.compile(
    rf"\b(?:final\s+)?answers?\b[^\n.:=$\\]{{0,60}}?(?:\s+{_VERB}(?!\w)|\s*[:=])(?:[\s:]|[*_]+(?=[\s:]))*",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not|never|no\s+longer|neither|cannot)\b|n['’]t\b", re.IGNORECASE)
_INSTEAD = re.compile(r"\b(?:but(?:\s+rather)?|rather|it\s+is|it's|instead)\b\s*", re.IGNORECASE)
_FILLER = re.compile(
    r"\s*[*_]*(?:therefore|thus|then|hence|simply|just|indeed|now|actually|clearly|equal\s+to|given\s+by|the\s+number|found\s+to\s+be)"
    r"\b[*_]*[,:]?\s*",
    re.IGNORECASE,
)
_MATH = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<![\\$])\$(?!\$)((?:\\.|[^$\\])+?)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]",
    re.DOTALL,
)
_JOINT = re.compile(r"\s*(?:,\s*(?:and|or)?|;|and|or)\s*")
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
_LAST_NUMBER = re.compile(
    rf"(?<![\w.\\])[-−–]?\s?[$€£]?(?:(?:\d+\s)?\d+\s?/\s?\d+|{_NUMBER})(?:\s?(?:%|percent))?(?![A-Za-z0-9_])"
)
_STOP = re.compile(
    r"(?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\bProf)[.!?;](?=\s|\*|$)|\n|[.,]\s*[Ii] hope"
)
_LETTERED = re.compile(r"\(?[A-J]\)\s*\S")
_EMPHASIS = re.compile(r"(\*{1,3}|_{1,3})(?=\S)([^\n]+?)(?<=\S)\1(?![\w*])")
_END_OF_EMPHASIS = re.compile(r"([^*\n]*[^*\s])\*{2,3}(?![\w*])")
_GOES_ON = re.compile(r"\s*(?:,?\s*(?:and|or)\b|[,;]\s*(?=[-*_$\d\\(])|[=<>≤≥≈≠/+^×·]|\\(?!%))")
_PERCENT = re.compile(r"\s*(?:\\?%|percent)")
_ENGLISH = re.compile(
    r"(?<![\\A-Za-z])(?!(?:and|or|pi|sqrt|sin|cos|tan|log|ln|exp|mod|percent|max|min)(?![A-Za-z]))[A-Za-z]{2,}"
)
_QUALIFIED = re.compile(
    r"\b(?:no|not|least|most|more|less|fewer|greater|between|than|above|below)\b", re.IGNORECASE
)
_LONGEST_WORDS = 60  # characters of an answer in words


def final_text(response: str) -> str | None:
    """The final answer as it is written, or None where there is none."""
    boxes = list(_BOX.finditer(response))
    start = boxes[-1].end() if boxes else 0
    for phrase in reversed(list(_PHRASE.finditer(response, start))):
        if boxes and "final" not in phrase[0].lower():
            continue
        found = _after(response, phrase)
        if boxes and (found is None or not re.search(r"[\d$\\]", response[phrase.end() :].lstrip("*_ ")[:3])):
            continue
        return found
    if boxes:
        return _boxed(response, boxes)
    return _last_expression(response)


def _boxed(response: str, boxes: list[re.Match[str]]) -> str | None:
    """The content of the last box, joined with those of boxes that are one list with it."""
    spans = [_content(response, box) for box in boxes]
    if spans[-1] is None:
        return None
    # The outermost box around the last one, or that one, is the answer.
    last = min(place for place, span in enumerate(spans) if span is not None and span[1] >= spans[-1][1])
    first_start, first_end = boxes[last].start(), spans[last]
    assert first_end is not None
    contents = [response[first_end[0] : first_end[1]]]
    start = first_start
    for place in reversed(range(last)):
        span = spans[place]
        between = "" if span is None else response[span[1] + 1 : start]
        if span is None or not _one_list(between):
            break
        content = response[span[0] : span[1]]
        if content != contents[0]:
            contents.insert(0, content)
        start = boxes[place].start()
    texts = [_without_boxes(content).strip() for content in contents]
    return " , ".join(texts) if all(texts) else None


def _one_list(between: str) -> bool:
    return (
        _BETWEEN_BOXES.fullmatch(between) is not None
        and _SEPARATOR.search(between) is not None
        and _SENTENCE_END.search(between) is None
    )


def _content(response: str, box: re.Match[str]) -> tuple[int, int] | None:
    """Where the content of a box begins and ends; None where it is open or there is none."""
    place = box.end()
    if not response.startswith("{", place):
        bare = _BARE.match(response, place)
        return bare.span() if bare else None
    depth = 0
    while place < len(response):
        sign = response[place]
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return box.end() + 1, place
        place += 2 if sign == "\\" else 1
    return None


def _without_boxes(content: str) -> str:
    """The content with boxes inside of it opened."""
    while (inner := _BOX.search(content)) is not None:
        span = _content(content, inner)
        if span is None:
            return ""
        bare = content[inner.end() : inner.end() + 1] != "{"
        content = content[: inner.start()] + content[span[0] : span[1]] + content[span[1] + (not bare) :]
    return content


def _after(response: str, phrase: re.Match[str]) -> str | None:
    """What a phrase announces."""
    rest = response[phrase.end() :]
    bare = rest.lstrip("*_ ")
    if _NEGATED.search(phrase[0]) or _NEGATED.match(bare) or re.match(r"\w+ly\s+not\b", bare):
        instead = _INSTEAD.search(_first_sentence(rest))
        if instead is None:
            return None
        rest = rest[instead.end() :]
    while filler := _FILLER.match(rest):
        rest = rest[filler.end() :]
    if (listed := _listed(rest.lstrip("*_ "), 0)) is not None:
        return listed
    text = _emphasised(rest) or _first_sentence(rest.lstrip("*_ "))
    if (math := _MATH.search(text)) is not None:
        return _listed(text, math.start())
    return _plain(text)


def _emphasised(rest: str) -> str | None:
    """What stands in emphasis (`**Evelyn**`), or up to the end of one that began before; None without.

    None as well where the emphasis ends within an expression or a list.
    """
    emphasis = _EMPHASIS.match(rest) or _END_OF_EMPHASIS.match(_first_sentence(rest))
    if emphasis is None or _GOES_ON.match(rest, emphasis.end()):
        return None
    content = _first_sentence(emphasis[emphasis.lastindex or 0])
    return content + ("\\%" if _PERCENT.match(rest, emphasis.end()) else "")


def _first_sentence(text: str) -> str:
    return _STOP.split(text, maxsplit=1)[0]


def _plain(text: str) -> str | None:
    """An answer in a sentence without LaTeX: the sentence, or the number in it."""
    text = text.strip(" *_\"'`:,")
    words = list(_ENGLISH.finditer(text))
    numbers = list(_LAST_NUMBER.finditer(text))
    if not words or _LETTERED.match(text):
        return text or None
    if numbers and numbers[0].start() == 0:
        return text[: words[0].start()].strip(" ,(") or None
    if not numbers or _QUALIFIED.search(text) or len(numbers) > 1:
        return text if len(text) <= _LONGEST_WORDS else None
    return numbers[0][0]


def _listed(text: str, start: int) -> str | None:
    """The expression in mathematics at a place, with those that one list joins to it."""
    place, found = start, []
    while (math := _MATH.match(text, place)) is not None:
        found.append(next(group for group in math.groups() if group is not None))
        joint = _JOINT.match(text, math.end())
        if joint is None:
            break
        place = joint.end()
    if not found:
        return None
    percent = _PERCENT.match(text, math.end()) if math is not None else None
    return " , ".join(found) + ("\\%" if percent else "")


def _last_expression(response: str) -> str | None:
    """The last expression or number of a response that announces none."""
    spans = [match.span() for match in _MATH.finditer(response)]
    numbers = list(_LAST_NUMBER.finditer(response))
    if spans and (not numbers or spans[-1][1] > numbers[-1].end()):
        first = len(spans) - 1
        while first and _JOINT.fullmatch(response, spans[first - 1][1], spans[first][0]):
            first -= 1
        return _listed(response, spans[first][0])
    return numbers[-1][0].strip() if numbers else None
