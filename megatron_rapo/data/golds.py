"""Gold answers of a problem that has several, as the one text that a prompt carries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

Several = Literal["any", "all"]
"""`any`: each of the answers is right by itself; `all`: a response must give them all."""


def join(answers: Sequence[str], several: Several) -> str:
    """The answers as one text; a single one is itself, and none are blank."""
    if len(answers) < 2:
        return "".join(answers)
    return json.dumps({several: list(answers)}, ensure_ascii=False)


def split(answer: str) -> tuple[Several, list[str]]:
    """What `join` made a text of; of any other text, that text."""
    for several in ("any", "all"):
        if answer.startswith(f'{{"{several}": ["'):
            return several, json.loads(answer)[several]
    return "any", [answer]
