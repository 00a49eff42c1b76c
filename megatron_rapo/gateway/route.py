"""The way of one episode through the gateway: its limits, and what passes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable
from enum import StrEnum
from typing import Any, TypeVar

from megatron_rapo.episode.environment import Generate, Turn
from megatron_rapo.gateway.protocol import Asked
from megatron_rapo.gateway.record import Record

T = TypeVar("T")


class Ending(StrEnum):
    """Whether a limit cut the episode off; each is counted by its name."""

    ANSWERED = "answered"  # none: the program said what came of it
    OUT_OF_TURNS = "out_of_turns"
    OUT_OF_TOKENS = "out_of_tokens"


class Refusal(Exception):
    """A request that is not served, with the HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Route:
    """One episode's; open while its program plays.

    Attributes:
        key: which requests have in their path, and nobody can guess.
        record: what passed.
        turns: that were asked for.
        ending: by the first limit that a request met.
        refused: requests that were refused.
        failed: fails with what an engine's answer failed with: the episode cannot go on.
        over: whether the route is closed.
    """

    def __init__(self, generate: Generate, vocabulary: int, max_turns: int) -> None:
        self.key = secrets.token_urlsafe(24)
        self.record = Record()
        self.turns = 0
        self.ending = Ending.ANSWERED
        self.refused = 0
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.over = False
        self._working: set[asyncio.Task[Turn]] = set()
        self._generate = generate
        self._vocabulary = vocabulary
        self._max_turns = max_turns

    @property
    def max_tokens(self) -> int:
        """Tokens that a sequence may have."""
        return self._generate.tokens_left([])

    def begin(self, asked: Asked) -> asyncio.Task[Turn]:
        """Starts to sample the turn that was asked for; cancelled, it is given up.

        Raises:
            Refusal: it is none that the episode may have; the task, where the engines failed.
        """
        self._check(asked)
        number, self.turns = self.turns, self.turns + 1
        working = asyncio.create_task(self._turn(asked, number))
        self._working.add(working)
        working.add_done_callback(self._working.discard)
        return working

    async def aclose(self) -> None:
        """Gives up what is under way: the episode is over."""
        self.over = True
        self.failed.cancel()
        for working in (left := list(self._working)):
            working.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def recorded(self, question: object, answer: object) -> Any:
        """What was answered to the question when this step was first done; this answer, if it is that time.

        Raises:
            Refusal: it cannot be kept.
        """

        async def now() -> object:
            return answer

        return await self._while_possible(
            self._generate.recorded(question, now, again=True), "the run failed"
        )

    async def _turn(self, asked: Asked, number: int) -> Turn:
        turn = self._generate(
            asked.token_ids, turn=number, max_tokens=asked.sampling_params.max_tokens, stop=asked.stop
        )
        return await self._while_possible(turn, "the engines failed")

    async def _while_possible(self, answer: Awaitable[T], otherwise: str) -> T:
        try:
            return await answer
        except Exception as error:  # who runs the episode is told, by `failed`
            if not self.failed.done():
                self.failed.set_exception(error)
            raise Refusal(503, f"{otherwise}; the episode is given up") from error

    def _check(self, asked: Asked) -> None:
        if (token := asked.outside(self._vocabulary)) is not None:
            raise Refusal(
                400, f"token id {token} is outside the model's vocabulary of {self._vocabulary} tokens"
            )
        if self.turns >= self._max_turns:
            self._meet(Ending.OUT_OF_TURNS)
            raise Refusal(400, f"the episode has had its environment.max_turns = {self._max_turns} turns")
        if self._generate.tokens_left(asked.token_ids) < 1:
            self._meet(Ending.OUT_OF_TOKENS)
            raise Refusal(  # vLLM's words, which agents know a full context by
                400,
                f"This model's maximum context length is {self.max_tokens} tokens. However, your request has "
                f"{len(asked.token_ids)} input tokens (the problem's prompt and rollout.max_response_tokens "
                "bound a sequence). Please reduce the length of the input messages.",
            )

    def _meet(self, limit: Ending) -> None:
        if self.ending is Ending.ANSWERED:
            self.ending = limit
