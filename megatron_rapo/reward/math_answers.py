r"""The `math` verifier: a response's final answer against a gold answer.

The final answer is found in the response (`extraction`), brought to one notation (`notation`), read
(`reading`, `quantity`, `units`), and compared with the gold (`comparison`, `values`, `intervals`). Each
states its rules; together they are the marking scheme.

Imported in verifier processes only: SymPy can hang or eat memory on what a policy writes.
"""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_rapo.data.golds import split
from megatron_rapo.reward.comparison import same
from megatron_rapo.reward.extraction import final_text
from megatron_rapo.reward.notation import plain
from megatron_rapo.reward.reading import Answer, Words, listed, read

RESPONSE_TAIL = 4096
"""Characters at a response's end in which its final answer must stand; bounds the extraction's time."""

_INTEGER = re.compile(r"-?[0-9]{1,100}")
_SPACES = re.compile(r"(?<!\d) | (?!\d)")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_SENTENCES = re.compile(r"####|<<|[a-z]{2,}[^.]*[.!?]\s+[A-Z]|[a-z]{2,}\s*\n+\s*[A-Za-z]{2,}")
_MOST_WORDS = 10  # of a gold answer: no response will repeat a longer sentence


def is_correct(response: str, answer: str) -> bool:
    r"""Whether the response's final answer equals the gold answer.

    Args:
        response: any text; its last `RESPONSE_TAIL` characters count.
        answer: LaTeX or plain, such as `\frac{3}{4}`, `(1,2)`, `10,000`, `12\%`; several as `data.golds`
            joins them.

    Raises:
        ValueError: no response could match `answer`: it is empty, or a worked solution.
    """
    several, golds = split(answer)
    readings = [_gold(gold) for gold in golds]
    predicted = final_answer(response)
    if predicted is None:
        return False
    if several == "all":
        return same(listed(readings), read(predicted))
    return any(_matches(gold, reading, predicted) for gold, reading in zip(golds, readings, strict=True))


def final_answer(response: str) -> str | None:
    """The response's final answer as it is written; None where there is none."""
    return _final_answer(response[-RESPONSE_TAIL:])


def stating(answer: str) -> str:
    """A response that gives this gold answer."""
    several, golds = split(answer)
    return rf"\boxed{{{', '.join(golds) if several == 'all' else golds[0]}}}"


def _matches(gold: str, reading: Answer, predicted: str) -> bool:
    if _INTEGER.fullmatch(predicted) and _INTEGER.fullmatch(gold):
        return int(predicted) == int(gold)
    return _bare(predicted) == _bare(gold) or same(reading, read(predicted))


def _bare(text: str) -> str:
    """The text in one notation; a space between digits is kept."""
    return _SPACES.sub("", plain(text))


@lru_cache(maxsize=1)  # of the response that was just verified
def _final_answer(tail: str) -> str | None:
    found = final_text(tail)
    return found.strip() if found else None


@lru_cache(maxsize=4096)
def _gold(answer: str) -> Answer:
    text = (final_text(answer) or "") if "\\boxed" in answer else answer
    if _SENTENCES.search(text) or len(_WORD.findall(text)) > _MOST_WORDS:
        raise ValueError(
            f"the gold answer {text[:60]!r} is a sentence or a solution; give the final answer alone"
        )
    gold = read(text)
    if isinstance(gold, Words) and not gold.key:
        raise ValueError(f"the gold answer {answer[:60]!r} holds nothing to compare with")
    return gold
