"""One embedded server: SGLang's contract, and what it has beside that."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_rapo.engines.engine import EngineInfo
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.sglang.updates import piece
from megatron_rapo.errors import RapoError
from megatron_rapo.wire.slices import SliceMessage


class EmbeddedClient(SGLangClient):
    """Requests to one server."""

    takes_slices = True
    one_request_at_a_time = True

    async def info(self) -> EngineInfo:
        """As `Engine.info`.

        Raises:
            RapoError: it is SGLang, which has not all that this class takes for granted.
        """
        info = await super().info()
        if info.software.startswith("sglang "):
            raise RapoError(
                f'{self.url} is an SGLang server, but rollout.engine.kind = "embedded"; set it to "sglang"'
            )
        return info

    async def weights_checksum(self) -> tuple[str, dict[str, int]] | None:
        path = "/weights_checksum"
        answer = await self._ask(path, timeout=self._timeout)
        try:
            checksums = {name: int(value) for name, value in answer["checksums"].items()}
            return str(answer["weight_version"]), checksums
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._exchange.malformed(path, "no checksums", answer) from None

    async def receive_slices(
        self,
        messages: Sequence[SliceMessage],
        group: str,
        dtype: torch.dtype,
        version: int | None,
        *,
        timeout: float,
    ) -> None:
        body = {
            **piece(version),
            "group_name": group,
            "dtype": str(dtype).removeprefix("torch."),
            "messages": [
                {
                    "source": message.source,
                    "engine_rank": message.engine_rank,
                    "slices": [list(one) for one in message.slices],
                }
                for message in messages
            ],
        }
        await self.post("/update_weights_from_shards", body, timeout=timeout)
