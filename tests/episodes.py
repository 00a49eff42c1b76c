"""Scored episodes for tests: a prompt and one response each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence


def scored_response(
    outcome: Outcome,
    token_ids: Sequence[int],
    *,
    prompt: Sequence[int] = (7, 8),
    log_probs: Sequence[float] | None = None,
    truncated: bool = False,
    version: int = 0,
) -> ScoredEpisode:
    """One response to a prompt; log-probs are −1 where none are given."""
    values = [-1.0] * len(token_ids) if log_probs is None else log_probs
    sequence = TokenSequence.of_response(
        prompt, np.array(token_ids, np.int32), np.array(values, np.float32), version
    )
    return ScoredEpisode(Episode((sequence,), "", truncated=truncated), Verification(outcome))


def group_of(*episodes: ScoredEpisode, number: int = 0) -> Group:
    """The episodes of problem `number`."""
    return Group(Problem(str(number), "?"), episodes)


def random_sequence(random: np.random.Generator, prompt: int, response: int) -> TokenSequence:
    """Random tokens of the tests' small vocabulary, with log-probs near −2."""
    token_ids = random.integers(2, 59, prompt + response).astype(np.int32)
    log_probs = random.normal(-2, 1, response).astype(np.float32)
    return TokenSequence.of_response(token_ids[:prompt], token_ids[prompt:], log_probs, version=0)


def prompt_tokens(sequence: TokenSequence) -> int:
    """Tokens before the first sampled one."""
    return int(sequence.sampled.argmax())
