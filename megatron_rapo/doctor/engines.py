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
from megatron_rapo.engines.exchange import http_client
from megatron_rapo.engines.sglang.client import EngineClient
from megatron_rapo.errors import EngineLost, RapoError
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
        timeout: seconds for an answer.

    Raises:
        RapoError: from every call, where an engine is gone, refuses, or answers what no engine does.
    """

    def __init__(self, urls: Sequence[str], timeout: float) -> None:
        self._runner = asyncio.Runner()
        self._http = http_client()
        self._clients = [EngineClient(self._http, url, timeout=timeout) for url in urls]

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
        params = {"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        return self._each(lambda client: _generate(client, prompts, [params] * len(prompts)))

    def sampled(self, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, list[Answer]]:
        """Responses, asked for as a run does."""
        request = first_turns(prompts, sampling)
        return self._each(lambda client: _generate(client, request.input_ids, request.sampling_params))

    def prefilled(
        self, answers: Mapping[str, Sequence[Answer]]
    ) -> Mapping[str, list[npt.NDArray[np.float64]] | None]:
        """Log-probs of each engine's own answers at temperature 1, read in one go as if they were prompts.

        None from an engine that does not tell those of prompts.
        """
        return self._each(lambda client: _prefilled(client, answers[client.url]))

    def _each(self, ask: Callable[[EngineClient], Coroutine[Any, Any, T]]) -> dict[str, T]:
        answers = self._runner.run(all_of(ask(client) for client in self._clients))
        return dict(zip((client.url for client in self._clients), answers, strict=True))


async def _generate(
    client: EngineClient, prompts: Sequence[tuple[int, ...]], params: Sequence[dict[str, Any]]
) -> list[Answer]:
    answers = await client.generate(prompts, params)
    return [_answer(prompt, answer, client.url) for prompt, answer in zip(prompts, answers, strict=True)]


def _answer(prompt: tuple[int, ...], answer: Mapping[str, Any], url: str) -> Answer:
    try:
        reported = answer["meta_info"]["output_token_logprobs"]
        token_ids = np.array(answer["output_ids"], np.int64)
        log_probs = np.array([entry[0] for entry in reported], np.float64)
        named = [entry[1] for entry in reported]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RapoError(
            f"{url} sent a response that lacks what SGLang sends ({error!r}): {str(answer)[:500]}; "
            "is this an SGLang server, 0.5.14 or later?"
        ) from error
    if not len(token_ids) or named != token_ids.tolist() or not np.isfinite(log_probs).all():
        raise RapoError(
            f"{url} sent tokens and log-probs that do not go together: {str(answer)[:500]}; "
            "this server's responses cannot be trained on"
        )
    return Answer(prompt, token_ids, log_probs)


async def _prefilled(client: EngineClient, answers: Sequence[Answer]) -> list[npt.NDArray[np.float64]] | None:
    body = {
        "input_ids": [answer.sequence for answer in answers],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    try:
        found = await client.post("/generate", body)
    except EngineLost:
        raise
    except RapoError:
        return None  # refused: the embedded server has no such parameter
    told = [entry["meta_info"].get("input_token_logprobs") for entry in found]
    if not all(told):
        return None
    return [
        np.array([entry[0] for entry in entries[-len(answer.token_ids) :]], np.float64)
        for answer, entries in zip(answers, told, strict=True)
    ]
