"""How many different answers and solutions the correct responses to a problem have."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.evaluation.pass_at_k import pass_at_k
from megatron_rapo.evaluation.store import SampleStore

DRAWN = 4  # correct responses that different ones are counted among

_FORM = re.compile(r"[0-9]+|[-+*/=^()\\×÷−<>]")


@dataclass(frozen=True)
class Diversity:
    """Means over the problems with at least `DRAWN` correct responses.

    Attributes:
        problems: how many these are; with 0 of them the rest is 0.
        answers: different ways to write the final answer, expected among `DRAWN` correct responses.
        forms: different solution forms, likewise. The form of a response is its numbers and signs in order:
            responses that differ in words alone have one form.
    """

    problems: int
    answers: float
    forms: float


def diversity(store: SampleStore) -> Diversity:
    """Of all correct responses; expected among a fixed number of them, as more responses have more forms."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    forms: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for batch in store.stream(["problem", "extracted", "text"], outcome=Outcome.CORRECT):
        for row in batch.to_pylist():
            answers[row["problem"]]["".join((row["extracted"] or "").split())] += 1
            forms[row["problem"]][" ".join(_FORM.findall(row["text"]))] += 1
    enough = [problem for problem, found in forms.items() if found.total() >= DRAWN]
    if not enough:
        return Diversity(0, 0.0, 0.0)
    return Diversity(
        len(enough),
        float(np.mean([_expected(answers[problem]) for problem in enough])),
        float(np.mean([_expected(forms[problem]) for problem in enough])),
    )


def _expected(found: Counter[str]) -> float:
    """Kinds expected among `DRAWN` of the responses: each is met as pass@k meets a success."""
    return float(pass_at_k(np.array(list(found.values())), found.total(), DRAWN).sum())
