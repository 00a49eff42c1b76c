"""The reward `format`: whether a response has a given form."""

from __future__ import annotations

import re

from megatron_rapo.episode.problem import Problem


def score(response: str, problem: Problem, *, pattern: str) -> float:
    """1 where the whole response matches the regular expression, else 0."""
    return float(re.fullmatch(pattern, response) is not None)
