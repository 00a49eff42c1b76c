"""What the run trains on: prompts with their gold answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sampled from.

    Attributes:
        index: position in its prompt set; the same problem has the same index in every run.
        question: the problem as its source gives it.
        token_ids: the templated prompt.
        answer: the gold answer, in the verifier's notation.
    """

    index: int
    question: str
    token_ids: tuple[int, ...]
    answer: str
