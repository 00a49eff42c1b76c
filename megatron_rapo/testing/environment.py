"""Environments in tests: engines that say what the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from megatron_rapo.episode.environment import Environment, Turn, close
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.problem import Problem
from megatron_rapo.testing.made_up import LOG_PROB, VERSION

TOKENS = 2**15  # of an episode, at most


class ScriptedGenerate:
    """A `Generate` that samples the given texts, one a call.

    Attributes:
        asked: the tokens that each call continued.
    """

    def __init__(self, turns: Sequence[str]) -> None:
        """`turns`: what each call samples, in order."""
        self.asked: list[list[int]] = []
        self._turns = list(turns)
        self._numbers: set[int] = set()

    async def __call__(
        self,
        token_ids: Sequence[int],
        *,
        turn: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[int] = (),
    ) -> Turn:
        """See `Generate`.

        Raises:
            AssertionError: more turns are asked for than there are, or one number twice.
        """
        assert len(self.asked) < len(self._turns), (
            f"the environment asks for turn {len(self.asked) + 1}, and the test has {len(self._turns)}"
        )
        assert turn not in self._numbers, f"generate was called twice with turn = {turn}; count the calls"
        self._numbers.add(turn)
        whole = self.encode(self._turns[len(self.asked)])
        self.asked.append(list(token_ids))
        ends = [place + 1 for place, token in enumerate(whole) if token in stop][:1]
        sampled = whole[: ends[0] if ends else len(whole)][:max_tokens]
        cut = len(sampled) < (ends[0] if ends else len(whole))
        return Turn(
            token_ids=np.array(sampled, np.int32),
            log_probs=np.full(len(sampled), LOG_PROB, np.float32),
            versions=np.full(len(sampled), VERSION, np.int32),
            finish="length" if cut else "stop",
            text=self.decode(sampled),
        )

    async def recorded(
        self, question: object, ask: Callable[[], Awaitable[Any]], *, again: bool = False
    ) -> Any:
        """See `Generate`; asks each time."""
        return json.loads(json.dumps(await ask()))

    def tokens_left(self, token_ids: Sequence[int]) -> int:
        """See `Generate`."""
        return TOKENS - len(token_ids)

    def encode(self, text: str) -> list[int]:
        """A token for each character."""
        return list(map(ord, text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The characters."""
        return "".join(map(chr, token_ids))


def run_environment(
    environment: Environment, problem: Problem, turns: Sequence[str], *, seed: int = 0
) -> Episode:
    """The episode that comes of it where the policy says `turns`.

    Raises:
        AssertionError: the environment asks for more turns, or for fewer, or returns no episode.
    """
    generate = ScriptedGenerate(turns)
    episode = asyncio.run(_run(environment, problem, generate, seed))
    assert isinstance(episode, Episode), f"run returned {episode!r:.100}, no Episode"
    assert len(generate.asked) == len(turns), (
        f"the environment asked for {len(generate.asked)} of the test's {len(turns)} turns"
    )
    return episode


async def _run(environment: Environment, problem: Problem, generate: ScriptedGenerate, seed: int) -> Episode:
    try:
        return await environment.run(problem, generate, seed)
    finally:
        await close(environment)
