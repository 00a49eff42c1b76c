"""Responses judged against gold answers alone, for tests that need no more of a problem."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.reward.verifier import Verifier


def verified(verifier: Verifier, items: Sequence[tuple[str, str]]) -> list[Verification]:
    """Of (response, gold answer) pairs."""
    return verifier.verify([(response, Problem("", "", gold)) for response, gold in items])


def outcomes(verifier: Verifier, items: Sequence[tuple[str, str]]) -> list[Outcome]:
    """Of (response, gold answer) pairs."""
    return [one.outcome for one in verified(verifier, items)]
