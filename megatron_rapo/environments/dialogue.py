"""An episode as a conversation whose tokens are exactly those that were sampled and given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_rapo.environments.rendering import Message, Rendering
from megatron_rapo.episode.environment import Generate, Transcript, Turn
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.score import Score


class Ending(StrEnum):
    """How a conversation ended; each is counted by its name."""

    ANSWERED = "answered"  # the policy said its last, or the user had heard enough
    OUT_OF_TURNS = "out_of_turns"
    OUT_OF_TOKENS = "out_of_tokens"
    NOT_CONTINUED = "not_continued"  # the template cannot go on from what was sampled without rewriting it


@dataclass(frozen=True)
class Said:
    """A turn of the policy.

    Attributes:
        turn: as it was sampled.
        parsed: content, reasoning and calls (`renderers.base.ParsedResponse`).
    """

    turn: Turn
    parsed: Any

    @property
    def message(self) -> Message:
        """What functions that read messages see of it."""
        return {"role": "assistant", "content": self.parsed.content}


class Dialogue:
    """The policy's turns, and what is said to it between them.

    Attributes:
        turns: how many the policy had.
    """

    def __init__(self, problem: Problem, generate: Generate, rendering: Rendering, max_turns: int) -> None:
        self.turns = 0
        self._generate = generate
        self._rendering = rendering
        self._max_turns = max_turns
        self._transcript = Transcript(problem.token_ids)
        self._prompt = list(problem.token_ids)  # of the last turn
        self._last: Turn | None = None

    async def hear(self) -> Said:
        """The policy's next turn."""
        self._prompt = self._transcript.token_ids
        turn = await self._generate(self._prompt, turn=self.turns, stop=self._rendering.stop)
        self.turns += 1
        self._last = turn
        self._transcript.add_turn(turn)
        return Said(turn, self._rendering.parse(self._prompt, turn.token_ids.tolist()))

    def say(self, messages: Sequence[Message]) -> Ending | None:
        """Gives the policy these messages; or why it has no further turn, and they are not given then."""
        assert self._last is not None
        if self.turns >= self._max_turns:
            return Ending.OUT_OF_TURNS
        given = self._rendering.continuation(self._prompt, self._last.token_ids.tolist(), messages)
        if given is None:
            return Ending.NOT_CONTINUED
        if self._generate.tokens_left(self._transcript.token_ids) <= len(given):
            return Ending.OUT_OF_TOKENS
        self._transcript.add_given(given)
        return None

    def episode(self, ending: Ending, facts: dict[str, float], score: Score | None = None) -> Episode:
        """All of it; what is judged is the policy's last turn."""
        assert self._last is not None
        return Episode(
            sequences=(self._transcript.sequence(),),
            answer=self._last.text,
            score=score,
            truncated=ending is not Ending.ANSWERED,
            facts={"turns": self.turns, **{f"ended_{one}": float(one is ending) for one in Ending}, **facts},
        )
