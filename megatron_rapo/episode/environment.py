"""The protocol between a problem and the engines: what an environment is given, and what it returns."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence


@dataclass(frozen=True)
class Turn:
    """What an engine sampled in one call.

    Attributes:
        token_ids: `[tokens]` int32, the end-of-sequence token included where the engine emitted it; none
            where no token was left of `rollout.max_response_tokens`.
        log_probs: `[tokens]` float32, in nats, of the temperature-scaled distribution.
        versions: `[tokens]` int32, of the weights that sampled each.
        finish: `stop`, or `length` where a limit of tokens cut it.
        text: the tokens as text, special tokens left out.
    """

    token_ids: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]
    versions: npt.NDArray[np.int32]
    finish: Literal["stop", "length"]
    text: str

    @property
    def truncated(self) -> bool:
        """Whether a limit of tokens cut it."""
        return self.finish == "length"


class Generate(Protocol):
    """Samples from the policy: tokens in, tokens out, one call a turn."""

    async def __call__(
        self,
        token_ids: Sequence[int],
        *,
        turn: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[int] = (),
    ) -> Turn:
        """Continues the tokens.

        Args:
            token_ids: the problem's prompt, and what came after it.
            turn: the number of the call within the episode; it seeds the sample, so each call has its own.
            max_tokens: at most; never more than is left of `rollout.max_response_tokens`.
            stop: token ids that end the turn, besides the model's own end of sequence.
        """
        ...

    async def recorded(
        self, question: object, ask: Callable[[], Awaitable[Any]], *, again: bool = False
    ) -> Any:
        """What `ask` comes to: of what may answer otherwise when it is asked again, such as a search.

        Where a step is done again after the run was killed, the answer is the one that was heard first, so
        that the episode has the same tokens. Evaluations keep no answers.

        Args:
            question: what is asked, as JSON has it; with what was sampled so far it names the answer.
            ask: gives an answer that JSON can write; what it raises is not kept.
            again: whether `ask` is called also where the answer is known, since it changes what later ones
                hang on.

        Returns:
            The answer as JSON has it: lists for tuples, say.
        """
        ...

    def tokens_left(self, token_ids: Sequence[int]) -> int:
        """How many more tokens may follow these, sampled or given; none where it is 0 or less."""
        ...

    def encode(self, text: str) -> list[int]:
        """A text's tokens, without special tokens around it."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokens as text, special tokens left out."""
        ...


class Environment(Protocol):
    """Turns a problem into an episode. One object serves all episodes of a process, several at a time.

    Where it has `async def aclose(self)`, that is awaited once it has no more episodes.
    """

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        """One try at the problem.

        Args:
            problem: prompt tokens, and all columns of the row.
            generate: samples from the policy.
            seed: of this episode, for what the environment itself draws: the same in a repeated run.
        """
        ...


async def close(environment: Environment) -> None:
    """Has the environment close what it opened, where it has `aclose`."""
    if (aclose := getattr(environment, "aclose", None)) is not None:
        await aclose()


class Transcript:
    """The tokens of an episode in the making: what was given, and what was sampled, in order."""

    def __init__(self, prompt: Sequence[int]) -> None:
        """Begins with the prompt's tokens."""
        self._token_ids = list(prompt)
        self._sampled = [False] * len(prompt)
        self._log_probs = [float("nan")] * len(prompt)
        self._versions = [-1] * len(prompt)

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far: what the next turn continues."""
        return list(self._token_ids)

    def add_turn(self, turn: Turn) -> None:
        """Appends what an engine sampled."""
        self._extend(turn.token_ids.tolist(), True, turn.log_probs.tolist(), turn.versions.tolist())

    def add_given(self, token_ids: Sequence[int]) -> None:
        """Appends what the environment says; it is not trained on."""
        count = len(token_ids)
        self._extend(list(token_ids), False, [float("nan")] * count, [-1] * count)

    def sequence(self) -> TokenSequence:
        """All of it, as what is trained on."""
        return TokenSequence(
            token_ids=np.array(self._token_ids, np.int32),
            sampled=np.array(self._sampled, bool),
            log_probs=np.array(self._log_probs, np.float32),
            versions=np.array(self._versions, np.int32),
        )

    def _extend(
        self, token_ids: list[int], sampled: bool, log_probs: list[float], versions: list[int]
    ) -> None:
        self._token_ids += token_ids
        self._sampled += [sampled] * len(token_ids)
        self._log_probs += log_probs
        self._versions += versions
