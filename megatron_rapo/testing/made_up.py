"""Made-up problems and groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence

LOG_PROB, VERSION = -1.0, 0  # of each token that is sampled


def a_problem(question: str, answer: str = "", **columns: Any) -> Problem:
    """A problem whose prompt is the question, with these columns of its row."""
    token_ids = tuple(map(ord, question))
    return Problem("0", question, answer, source="test", token_ids=token_ids, columns=columns)


def a_group(*rewards: float | None, problem: Problem | None = None, tokens: int = 4) -> Group:
    """A problem's episodes of these rewards, as methods see them.

    Args:
        rewards: of each; None is unknown.
        problem: default: one of no columns.
        tokens: that each episode has sampled.
    """
    problem = problem or a_problem("2+3=", "5")
    return Group(problem, tuple(_episode(reward, problem, tokens) for reward in rewards))


def _episode(reward: float | None, problem: Problem, tokens: int) -> ScoredEpisode:
    sampled, log_probs = np.full(tokens, ord("5"), np.int32), np.full(tokens, LOG_PROB, np.float32)
    sequence = Sequence.of_response(problem.token_ids, sampled, log_probs, version=VERSION)
    outcome = Outcome.CRASH if reward is None else Outcome.CORRECT if reward >= 1.0 else Outcome.WRONG
    return ScoredEpisode(Episode((sequence,), "5" * tokens), Verification(outcome, reward=reward))
