"""One vLLM server over its HTTP contract (0.32)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rapo.background import all_of
from megatron_rapo.engines.engine import EngineInfo, Generated, Generation
from megatron_rapo.engines.exchange import HEALTH_TIMEOUT_S
from megatron_rapo.engines.vllm.answers import generate_body, prompt_body, prompt_log_probs, to_generated
from megatron_rapo.engines.vllm.contact import GENERATE, describe
from megatron_rapo.engines.vllm.flags import SLEEP
from megatron_rapo.engines.vllm.updates import VLLMUpdates
from megatron_rapo.errors import EngineLost, RapoError

UNDER_WAY = 512  # continuations, a connection each; a process has 1,024 files by default


class VLLMClient(VLLMUpdates):
    """Requests to one server, a continuation a request: all of a `generate` are under way together."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._places = asyncio.Semaphore(UNDER_WAY)
        self._described: dict[str, Any] | None = None

    async def until_healthy(self, timeout: float) -> None:
        await self._exchange.until_healthy(timeout)

    async def silence(self, patience: float) -> str | None:
        """As `Engine.silence`; vLLM's front end answers for itself."""
        try:
            await self._exchange.status("GET", "/version", timeout=min(HEALTH_TIMEOUT_S, patience))
        except EngineLost as error:
            return str(error)
        return None

    async def info(self) -> EngineInfo:
        """As `Engine.info`.

        Raises:
            RapoError: it is no vLLM that a run can use; the message names the flag that it lacks.
        """
        if self._described is None:
            self._described = await describe(self._exchange)
        found = self._described
        try:
            return EngineInfo(
                model_path=str(found["model_path"]),
                weight_version=await self.weight_version(),
                tensor_parallel=int(found["ranks"]),
                dtype=str(found["dtype"]),
                software=f"vllm {found['version']}",
                context_length=int(found["context_length"]),
            )
        except (KeyError, TypeError, ValueError):
            raise self._exchange.malformed("/collective_rpc", "no description", found) from None

    async def weight_version(self) -> str:
        path = "/weight_info"
        answer = await self._exchange.json("GET", path, timeout=self._control_timeout)
        try:
            return str(answer["weight_version"])
        except (KeyError, TypeError):
            raise self._exchange.malformed(path, "no weight_version", answer) from None

    async def generate(
        self, wanted: Sequence[Generation], *, timeout: float | None = None
    ) -> list[Generated]:
        async def one(generation: Generation) -> Generated:
            return to_generated(await self._generate(generate_body(generation), timeout), self.url)

        return await all_of(one(generation) for generation in wanted)

    async def prompt_log_probs(
        self, sequences: Sequence[Sequence[int]]
    ) -> list[npt.NDArray[np.float64]] | None:
        answers = await all_of(self._generate(prompt_body(sequence), None) for sequence in sequences)
        pairs = zip(answers, sequences, strict=True)
        return [prompt_log_probs(answer, sequence) for answer, sequence in pairs]

    async def release_memory(self) -> None:
        """As `Engine.release_memory`: vLLM's sleep, of weights and cache.

        Raises:
            RapoError: it was started without sleep mode, and would give nothing back.
        """
        await self.info()
        assert self._described is not None
        if not self._described["sleep_mode"]:
            raise RapoError(
                f"{self.url} cannot give memory back, as rollout.colocated asks: start it with {SLEEP}, "
                "which takes a GPU"
            )
        await self._tell("/sleep?level=2")

    async def resume_memory(self) -> None:
        await self._tell("/wake_up")
        await self._tell("/pause?mode=keep")  # what it has now is of no use

    async def _generate(self, body: dict[str, Any], timeout: float | None) -> Any:
        async with self._places:
            return await self._exchange.json(
                "POST",
                GENERATE,
                body,
                timeout=self._timeout if timeout is None else timeout,
                when_late="raise rollout.request_timeout_s, or lower rollout.requests_per_engine",
            )
