"""The engines of a run as one: prompts in, groups of responses out, all from one version of the weights."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.client import Diagnose, EngineClient, http_client
from megatron_rapo.rollout.groups import RolloutGroup
from megatron_rapo.rollout.responses import to_response

T = TypeVar("T")


def sample_seed(seed: int, prompt_index: int, response: int) -> int:
    """The seed of one response: a pure function of the run's seed for this step, the prompt and its number.

    It does not depend on which data-parallel head asks, in which request, or of which server. 31 bits, since
    SGLang keeps seeds as int32.
    """
    digest = hashlib.blake2b(f"{seed}/{prompt_index}/{response}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class EnginePool:
    """Servers that sample from the same policy, behind plain calls; a context manager.

    Each data-parallel head has a pool of its own over the same addresses. Requests go to the servers in turn,
    all at once.

    Args:
        urls: addresses of the servers, http://HOST:PORT.
        vocab_size: of the policy; token ids outside it are refused.
        prompts_per_request: prompts that share one HTTP request.
        request_timeout: seconds for one request's answer.
        head: the data-parallel head's number: heads begin at different servers.
        diagnose: says why the server at a URL is gone, where that can be known (`EmbeddedServers.diagnose`).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        vocab_size: int,
        prompts_per_request: int,
        request_timeout: float,
        head: int = 0,
        diagnose: Diagnose | None = None,
    ) -> None:
        if not urls:
            raise ValueError("a pool needs at least one server")
        self._vocab_size = vocab_size
        self._prompts_per_request = prompts_per_request
        self._head = head
        self._runner = asyncio.Runner()
        self._http = http_client()
        self._clients = [
            EngineClient(self._http, url, timeout=request_timeout, diagnose=diagnose) for url in urls
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()

    def wait_until_healthy(self, timeout: float) -> None:
        """Waits until every server is ready.

        Raises:
            RapoError: one is not within `timeout` seconds, or is known to have ended.
        """
        self._runner.run(_all(client.until_healthy(timeout) for client in self._clients))

    def update_weights(self, model_path: Path, weight_version: int) -> None:
        """Makes every server load a checkpoint, and reads back that it has.

        Args:
            model_path: HF folder with safetensors, which the servers can read.
            weight_version: what these weights are called from now on.

        Raises:
            RapoError: a server refused them, or has another version afterwards.
        """
        self._runner.run(_all(_update(client, model_path, weight_version) for client in self._clients))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        responses_per_prompt: int,
        max_response_tokens: int,
        temperature: float,
        weight_version: int,
        seed: int,
    ) -> list[RolloutGroup]:
        """Samples responses to each prompt, with full support (no top-p, no top-k).

        Args:
            prompts: each with its index, which its responses' seeds come from.
            responses_per_prompt: responses of one group.
            max_response_tokens: where a response is cut.
            temperature: which log-probs include.
            weight_version: that must have sampled every token.
            seed: of this batch; another one for each step gives a repeated prompt other responses.

        Returns:
            A group for each prompt, in the order of the prompts. What is drawn does not depend on how prompts
            are spread over heads, requests and servers, beyond the rounding of logits in another batch.

        Raises:
            RapoError: a server failed, or sent what cannot be trained on.
        """
        self._check(prompts)
        size = self._prompts_per_request
        sampling = _Sampling(responses_per_prompt, max_response_tokens, temperature, weight_version, seed)
        requests = (
            self._request(
                self._clients[(self._head + i) % len(self._clients)], prompts[start : start + size], sampling
            )
            for i, start in enumerate(range(0, len(prompts), size))
        )
        return [group for groups in self._runner.run(_all(requests)) for group in groups]

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """Refuses unknown token ids here: where one reaches SGLang 0.5.21, the whole server ends."""
        for prompt in prompts:
            if not prompt.token_ids:
                raise RapoError(f"prompt {prompt.index} is empty; look at its row and at the template")
            for token in (min(prompt.token_ids), max(prompt.token_ids)):
                if not 0 <= token < self._vocab_size:
                    raise RapoError(
                        f"prompt {prompt.index} has token id {token}, but the policy's vocabulary has "
                        f"{self._vocab_size}; use the tokenizer of the model that is trained"
                    )

    async def _request(
        self, client: EngineClient, prompts: Sequence[Prompt], sampling: _Sampling
    ) -> list[RolloutGroup]:
        repeats = sampling.responses_per_prompt
        answers = await client.generate(
            [prompt.token_ids for prompt in prompts for _ in range(repeats)],
            [sampling.params(prompt, i) for prompt in prompts for i in range(repeats)],
        )
        responses = [
            to_response(
                answer,
                weight_version=sampling.weight_version,
                vocab_size=self._vocab_size,
                max_tokens=sampling.max_response_tokens,
                source=client.url,
            )
            for answer in answers
        ]
        return [
            RolloutGroup(prompt, tuple(responses[i * repeats : (i + 1) * repeats]))
            for i, prompt in enumerate(prompts)
        ]


@dataclass(frozen=True)
class _Sampling:
    """The arguments of one `generate`."""

    responses_per_prompt: int
    max_response_tokens: int
    temperature: float
    weight_version: int
    seed: int

    def params(self, prompt: Prompt, response: int) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_response_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "sampling_seed": sample_seed(self.seed, prompt.index, response),
        }


async def _update(client: EngineClient, model_path: Path, weight_version: int) -> None:
    await client.update_weights_from_disk(model_path, str(weight_version))
    if (found := await client.weight_version()) != str(weight_version):
        raise RapoError(
            f"{client.url} has weights version {found!r} after an update to {weight_version}: "
            "another run updates the same server; give every run its own"
        )


async def _all(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order. The first failure ends the rest, and is raised as it is."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
