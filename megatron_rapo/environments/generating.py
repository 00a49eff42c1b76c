"""The `Generate` that an episode is given: it keeps within the limits, and notes what was sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from megatron_rapo.environments.bundle import Bundle
from megatron_rapo.environments.fault import EnvironmentFault
from megatron_rapo.environments.recorded import Recorded
from megatron_rapo.episode.choices import Choices, ChoiceShape
from megatron_rapo.episode.environment import Turn
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.requests import Ask
from megatron_rapo.rollout.response import Response

Played = tuple[list[int], Turn]
"""A turn, after the tokens that it continues."""


@dataclass(frozen=True)
class Pieces:
    """A turn as far as it is sampled.

    Attributes:
        context: a digest of the tokens that it continues.
        sampled: its pieces, each by weights of one version.
    """

    context: str
    sampled: list[Response]

    def copy(self) -> Pieces:
        """It as it is now, whatever is added."""
        return Pieces(self.context, list(self.sampled))


Turns = dict[int, Pieces]
"""The turns of an episode, by number."""


class Generating:
    """One episode's turns.

    Attributes:
        turns: each with the tokens that it continues.
        failure: what an engine's answer failed with, or what the protocol does not allow: the episode counts
            for nothing then, whatever the environment makes of it.
    """

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: PreTrainedTokenizerBase,
        *,
        episode: int,
        prompt: Sequence[int],
        name_of: Callable[[int], str],
        seed_of: Callable[[int], int],
        max_tokens: int,
        max_turns: int,
        on_waiting: Callable[[bool], None],
        recorded: Recorded,
        played: Sequence[Played] = (),
        temperature: float | None = None,
        so_far: Turns | None = None,
    ) -> None:
        """
        Args:
            bundle: sends what is asked.
            tokenizer: the policy's.
            episode: its number in the bundle.
            prompt: the problem's tokens.
            name_of: what messages call a turn.
            seed_of: the seed of a turn.
            max_tokens: most tokens after the prompt, sampled or given.
            max_turns: most calls.
            on_waiting: is told when the episode begins and ends to wait for an engine.
            recorded: answers of code outside.
            played: its first turns, which another episode had: they are not sampled again.
            temperature: of the others; None: the bundle's.
            so_far: what was sampled of it before the run went on from a checkpoint; all that is sampled is
                added. Where the episode asks for something else now, that is sampled.
        """
        self.turns: list[Played] = []
        self.failure: Exception | None = None
        self._bundle = bundle
        self._tokenizer = tokenizer
        self._episode = episode
        self._prompt_tokens = len(prompt)
        self._name_of = name_of
        self._seed_of = seed_of
        self._max_tokens = max_tokens
        self._max_turns = max_turns
        self._on_waiting = on_waiting
        self._recorded = recorded
        self._played = played
        self._temperature = temperature
        self._so_far: Turns = {} if so_far is None else so_far
        self._numbers: set[int] = set()
        # Of each answer all tokens, and the experts of all but the last.
        self._told: list[tuple[npt.NDArray[np.int32], Choices]] = []

    async def __call__(
        self,
        token_ids: Sequence[int],
        *,
        turn: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[int] = (),
    ) -> Turn:
        """See `Generate`."""
        try:
            return await self._generate(token_ids, turn, max_tokens, stop)
        except (RapoError, EnvironmentFault) as error:
            self.failure = error
            raise

    async def _generate(
        self, token_ids: Sequence[int], turn: int, max_tokens: int | None, stop: Sequence[int]
    ) -> Turn:
        self._check(turn)
        given = list(map(int, token_ids))
        if len(self.turns) < len(self._played):
            return self._play_again(given)
        left = self.tokens_left(given)
        count = left if max_tokens is None else min(left, max_tokens)
        if count < 1:
            return _nothing()
        ask = Ask(
            self._name_of(turn), tuple(given), self._seed_of(turn), count, tuple(stop), self._temperature
        )
        pieces = self._pieces_of(turn, given)
        self._on_waiting(True)
        try:
            await self._bundle.ask(self._episode, ask, pieces)
        finally:
            self._on_waiting(False)
        turn_had = self._joined(pieces)
        if (told := pieces[-1].experts) is not None:
            self._told.append((np.concatenate([np.array(given, np.int32), turn_had.token_ids]), told))
        return self._had(given, turn_had)

    def _pieces_of(self, turn: int, given: Sequence[int]) -> list[Response]:
        """What there is of a turn."""
        context = hashlib.blake2b(np.asarray(given, np.int32).tobytes(), digest_size=16).hexdigest()
        known = self._so_far.get(turn)
        if known is None or known.context != context:
            known = self._so_far[turn] = Pieces(context, [])
        return known.sampled

    def _joined(self, pieces: Sequence[Response]) -> Turn:
        token_ids = np.concatenate([piece.token_ids for piece in pieces])
        return Turn(
            token_ids=token_ids,
            log_probs=np.concatenate([piece.log_probs for piece in pieces]),
            versions=np.repeat(
                np.array([piece.weight_version for piece in pieces], np.int32),
                [len(piece.token_ids) for piece in pieces],
            ),
            finish=pieces[-1].finish_reason,
            text=self.decode(token_ids.tolist()),
        )

    def _play_again(self, given: list[int]) -> Turn:
        """The next turn of the episode that this one goes on from."""
        before, turn = self._played[len(self.turns)]
        if given != before:
            raise EnvironmentFault(
                f"turn {len(self.turns)} of an episode that begins as another one did follows other tokens "
                "than there; draw by the episode's seed alone, and hear code outside by generate.recorded"
            )
        return self._had(given, turn)

    def _had(self, given: list[int], turn: Turn) -> Turn:
        self.turns.append((given, turn))
        self._recorded.hear(given, turn)
        return turn

    async def recorded(
        self, question: object, ask: Callable[[], Awaitable[Any]], *, again: bool = False
    ) -> Any:
        """See `Generate`."""
        try:
            return await self._recorded(question, ask, again=again)
        except (RapoError, EnvironmentFault) as error:
            self.failure = error
            raise

    def tokens_left(self, token_ids: Sequence[int]) -> int:
        """See `Generate`."""
        return self._max_tokens - (len(token_ids) - self._prompt_tokens)

    def encode(self, text: str) -> list[int]:
        """See `Generate`."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `Generate`."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def check(self, sequences: Sequence[TokenSequence]) -> None:
        """Whether what the episode would have trained on is, token for token, what engines sampled.

        Raises:
            EnvironmentFault: a sampled token of a sequence was not sampled there.
        """
        for sequence in sequences:
            place, end = 0, len(sequence)
            while place < end:
                if not sequence.sampled[place]:
                    place += 1
                    continue
                length = next((n for turn in self.turns if (n := _common(sequence, place, turn))), 0)
                if not length:
                    raise EnvironmentFault(
                        f"token {place} of a sequence is marked as sampled, but no engine sampled it there; "
                        "append turns and given tokens to a Transcript, as they are"
                    )
                place += length

    def with_experts(self, sequence: TokenSequence, shape: ChoiceShape) -> TokenSequence:
        """It with the experts that engines sent its tokens to, each token when it was first computed.

        A turn's answer tells those of its context too. What no turn tells stays unknown: the last token, and
        what was given after it.
        """
        experts, known = shape.untold(len(sequence)), 0
        for tokens, told in self._told:
            most = min(len(tokens), len(sequence))
            same = tokens[:most] == sequence.token_ids[:most]
            end = min(most if same.all() else int(same.argmin()), len(told))
            experts[known:end] = told[known:end]
            known = max(known, end)
        return replace(sequence, experts=experts)

    def _check(self, turn: int) -> None:
        if turn in self._numbers:
            raise EnvironmentFault(
                f"generate was called twice with turn = {turn}, which would draw the same tokens again; "
                "count the calls of an episode"
            )
        if len(self._numbers) >= self._max_turns:
            raise EnvironmentFault(
                f"an episode asked for more than environment.max_turns = {self._max_turns} turns; end it, or "
                "raise that"
            )
        self._numbers.add(turn)


def _common(sequence: TokenSequence, place: int, turn: Played) -> int:
    """How many of the turn's tokens stand at that place of the sequence; 0 where it was not sampled there."""
    given, sampled = turn
    if place != len(given) or not np.array_equal(sequence.token_ids[:place], given):
        return 0
    run = sequence.sampled[place : place + len(sampled.token_ids)]
    length = len(run) if run.all() else int(run.argmin())
    here = slice(place, place + length)
    same = (
        np.array_equal(sequence.token_ids[here], sampled.token_ids[:length])
        and np.array_equal(sequence.log_probs[here], sampled.log_probs[:length])
        and np.array_equal(sequence.versions[here], sampled.versions[:length])
    )
    return length if same else 0


def _nothing() -> Turn:
    return Turn(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), "length", "")
