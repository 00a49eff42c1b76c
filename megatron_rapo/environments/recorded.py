"""What an episode hears from outside: asked once, and the same again where a step is done again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_rapo.environments.fault import EnvironmentFault
from megatron_rapo.episode.environment import Turn


class Answers(Protocol):
    """Answers of a step, by key."""

    def find(self, key: str) -> tuple[bool, Any]:
        """Whether there is one of that key, and the answer."""

    def keep(self, key: str, answer: Any) -> None:
        """Keeps one, which JSON can write."""


class Recorded:
    """The answers of one episode.

    An answer belongs to what was asked, and to all that the policy had said before: where a step that is done
    again samples other tokens, as it may on GPUs, nothing is taken from another conversation.
    """

    def __init__(self, answers: Answers | None, episode: str) -> None:
        """
        Args:
            answers: of the step; None: nothing is kept, as in evaluations.
            episode: unique in the step, and the same where it is done again.
        """
        self._answers = answers
        self._said = hashlib.blake2b(episode.encode(), digest_size=16)
        self._heard: list[tuple[Sequence[int], npt.NDArray[np.int32]]] = []  # turns that it has not yet
        self._asked: Counter[str] = Counter()

    def hear(self, given: Sequence[int], turn: Turn) -> None:
        """The policy had a turn; it costs nothing until something is asked."""
        self._heard.append((given, turn.token_ids))
        self._asked.clear()

    async def __call__(
        self, question: object, ask: Callable[[], Awaitable[Any]], *, again: bool = False
    ) -> Any:
        """See `Generate.recorded`.

        Raises:
            EnvironmentFault: JSON cannot write the answer.
        """
        key = self._key(question)
        found, answer = (False, None) if self._answers is None else self._answers.find(key)
        if found and not again:
            return answer
        fresh = _as_json(await ask())
        if found:
            return answer
        if self._answers is not None:
            self._answers.keep(key, fresh)
        return fresh

    def _key(self, question: object) -> str:
        """Of the question at this place; the same one asked twice has two."""
        parts: Iterable[Sequence[int] | npt.NDArray[np.int32]] = chain.from_iterable(self._heard)
        for part in parts:
            self._said.update(f"{len(part)}:".encode())
            self._said.update(np.asarray(part, np.int32).tobytes())
        self._heard.clear()
        text = json.dumps(question, sort_keys=True, default=repr)
        self._asked[text] += 1
        digest = self._said.copy()
        digest.update(f"{self._asked[text]} {text}".encode())
        return digest.hexdigest()


def _as_json(answer: object) -> Any:
    try:
        return json.loads(json.dumps(answer))
    except (TypeError, ValueError, RecursionError) as error:
        raise EnvironmentFault(
            f"generate.recorded was given {answer!r:.100}, which JSON cannot write ({error}); give texts, "
            "numbers, lists and dicts"
        ) from error
