"""One engine over SGLang's HTTP contract (0.5.14 to 0.5.23), which the embedded server speaks as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rapo.engines.engine import EngineInfo, Generated, Generation
from megatron_rapo.engines.exchange import HEALTH_TIMEOUT_S
from megatron_rapo.engines.sglang.answers import generate_body, prompt_log_probs, to_generated
from megatron_rapo.engines.sglang.updates import SGLangUpdates
from megatron_rapo.errors import EngineLost, RapoError

MEMORY = {"tags": ["weights", "kv_cache"]}


class SGLangClient(SGLangUpdates):
    """Requests to one server.

    Answers are never streamed: a group counts once it is complete, and an event a token costs more than the
    token.
    """

    async def until_healthy(self, timeout: float) -> None:
        await self._exchange.until_healthy(timeout)

    async def silence(self, patience: float) -> str | None:
        """As `Engine.silence`.

        SGLang answers /health by generating, which waits while kernels are compiled or memory is released.
        """
        try:
            await self._exchange.status("GET", "/model_info", timeout=min(HEALTH_TIMEOUT_S, patience))
        except EngineLost as error:
            return str(error)
        return None

    async def info(self) -> EngineInfo:
        model = await self._ask("/model_info")
        server = await self._ask("/server_info")
        try:
            return EngineInfo(
                model_path=str(model["model_path"]),
                weight_version=str(model["weight_version"]),
                tensor_parallel=int(server["tp_size"]),
                dtype=str(server["dtype"]),
                # Only SGLang does not give its name.
                software=f"{server.get('server', 'sglang')} {server.get('version', 'of unknown version')}",
            )
        except (KeyError, TypeError, ValueError) as error:
            answers = {"/model_info": model, "/server_info": server}
            raise self._exchange.malformed("", f"something that lacks {error}", answers) from None

    async def weight_version(self) -> str:
        info = await self._ask("/model_info")
        try:
            return str(info["weight_version"])
        except (KeyError, TypeError):
            raise self._exchange.malformed("/model_info", "no weight_version", info) from None

    async def generate(
        self, wanted: Sequence[Generation], *, timeout: float | None = None
    ) -> list[Generated]:
        answers = await self._generate(generate_body(wanted), timeout)
        return [to_generated(answer, self.url) for answer in answers]

    async def prompt_log_probs(
        self, sequences: Sequence[Sequence[int]]
    ) -> list[npt.NDArray[np.float64]] | None:
        body = {
            "input_ids": sequences,
            "sampling_params": [{"max_new_tokens": 1, "temperature": 1.0}] * len(sequences),
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        try:
            answers = await self._generate(body, None)
        except EngineLost:
            raise
        except RapoError:
            return None  # refused: the embedded server has no such parameter
        return prompt_log_probs(answers, sequences)

    async def release_memory(self) -> None:
        await self._tell("/release_memory_occupation", MEMORY)

    async def resume_memory(self) -> None:
        await self._tell("/resume_memory_occupation", MEMORY)

    async def _generate(self, body: dict[str, Any], timeout: float | None) -> list[Any]:
        answers = await self.post("/generate", body, timeout=timeout)
        count = len(body["input_ids"])
        if not isinstance(answers, list) or len(answers) != count:
            raise self._exchange.malformed("/generate", f"not a list of {count} responses", answers)
        return answers

    async def _ask(self, path: str, *, timeout: float | None = None) -> Any:
        return await self._exchange.json("GET", path, timeout=timeout or self._control_timeout)
