"""What the doctor asks of each engine by itself, past the pool: a fault may be one engine's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_rapo.background import all_of
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.engine import Connect, Engine, Generated, Generation
from megatron_rapo.engines.exchange import http_client
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.requests import Sampling, first_turns

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """A response to a prompt: `token_ids` `[tokens]`, `log_probs` `[tokens]` in nats, as reported."""

    prompt: tuple[int, ...]
    token_ids: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float64]

    @property
    def sequence(self) -> tuple[int, ...]:
        """Prompt and response."""
        return (*self.prompt, *self.token_ids.tolist())


class EngineProbe:
    """Questions to all engines at once; each call returns the engines' answers by address.

    Args:
        urls: their addresses.
        connect: makes what speaks to each.
        timeout: seconds for an answer.

    Raises:
        RapoError: from every call, where an engine is gone, refuses, or answers what no engine does.
    """

    def __init__(self, urls: Sequence[str], connect: Connect, timeout: float) -> None:
        self._runner = asyncio.Runner()
        self._http = http_client()
        self._clients = [connect(self._http, url, timeout=timeout) for url in urls]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()

    def versions(self) -> dict[str, str]:
        """The version of each engine's weights, as it spells it."""
        return self._each(lambda client: client.weight_version())

    def flush(self) -> None:
        """Has each forget what it cached."""
        self._each(lambda client: client.flush_cache())

    def greedy(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> dict[str, list[Answer]]:
        """The likeliest continuations, each of so many tokens; log-probs are at temperature 1."""
        wanted = [Generation(prompt, tokens, temperature=0.0, ignore_eos=True) for prompt in prompts]
        return self._each(lambda client: _generate(client, wanted))

    def sampled(self, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, list[Answer]]:
        """Responses, asked for as a run does."""
        request = first_turns(prompts, sampling)
        return self._each(lambda client: _generate(client, request.wanted))

    def prefilled(
        self, answers: Mapping[str, Sequence[Answer]]
    ) -> Mapping[str, list[npt.NDArray[np.float64]] | None]:
        """Log-probs of each engine's own answers at temperature 1, read in one go as if they were prompts.

        None from an engine that does not tell those of prompts.
        """
        return self._each(lambda client: _prefilled(client, answers[client.url]))

    def _each(self, ask: Callable[[Engine], Coroutine[Any, Any, T]]) -> dict[str, T]:
        answers = self._runner.run(all_of(ask(client) for client in self._clients))
        return dict(zip((client.url for client in self._clients), answers, strict=True))


async def _generate(engine: Engine, wanted: Sequence[Generation]) -> list[Answer]:
    answers = await engine.generate(wanted)
    return [_answer(one.token_ids, answer, engine.url) for one, answer in zip(wanted, answers, strict=True)]


def _answer(prompt: tuple[int, ...], answer: Generated, url: str) -> Answer:
    if not len(answer.token_ids) or not np.isfinite(answer.log_probs).all():
        raise RapoError(
            f"{url} sent a response without tokens, or with log-probs that are not finite: "
            f"{str(answer)[:500]}; this server's responses cannot be trained on"
        )
    return Answer(prompt, answer.token_ids, answer.log_probs.astype(np.float64))


async def _prefilled(engine: Engine, answers: Sequence[Answer]) -> list[npt.NDArray[np.float64]] | None:
    told = await engine.prompt_log_probs([answer.sequence for answer in answers])
    if told is None:
        return None
    return [one[-len(answer.token_ids) :] for one, answer in zip(told, answers, strict=True)]
