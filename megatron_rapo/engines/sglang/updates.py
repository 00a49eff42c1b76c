"""How SGLang is given weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import httpx
from torch import Tensor

from megatron_rapo.engines.engine import Diagnose, Engine
from megatron_rapo.engines.exchange import CONTROL_TIMEOUT_S, POLL_S, Exchange
from megatron_rapo.engines.sglang.handles import handles
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.wire.bucket import TensorMetadata
from megatron_rapo.wire.group import Meeting

FLUSH_TIMEOUT_S = 10.0  # that a server may take to become idle


class SGLangUpdates(Engine):
    """The requests that change weights, and hold generation back meanwhile."""

    def __init__(
        self, http: httpx.AsyncClient, url: str, *, timeout: float, diagnose: Diagnose | None = None
    ) -> None:
        """See `engine.Connect`."""
        self._exchange = Exchange(http, url, diagnose)
        self._timeout, self._control_timeout = timeout, min(timeout, CONTROL_TIMEOUT_S)
        self._sessions: bool | None = None  # None: not asked yet

    @property
    def url(self) -> str:
        return self._exchange.url

    async def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Holds generation back. Requests under way are ended, or go on after `continue_generation`."""
        await self._tell("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        """Undoes `pause`."""
        await self._tell("/continue_generation", {})

    async def flush_cache(self) -> None:
        """As `Engine.flush_cache`.

        Asked again and again, FLUSH_TIMEOUT_S seconds at most: where SGLang itself is told to wait, it waits
        for requests that a pause holds back.
        """
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while True:
            try:
                return await self._tell("/flush_cache", {})
            except EngineLost:
                raise
            except RapoError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(POLL_S)

    async def begin_update(self) -> None:
        """As `Engine.begin_update`: requests wait, no cache is left, the update is open.

        In this order, since SGLang 0.5.21 can die of an update that itself flushes the cache just after a
        request has ended.
        """
        try:
            await self._quiesce()
            if await self.has_sessions():
                await self._begin_session()
        except EngineLost:
            raise  # nothing more is asked of it: each request would take its time
        except RapoError:
            await self.abandon_update()
            raise

    async def end_update(self, version: int) -> None:
        """As `Engine.end_update`; the version came with the last piece."""
        try:
            if await self.has_sessions():
                await self.post("/end_weight_update", {})
        except EngineLost:
            raise
        except RapoError:
            await self._try_to_continue()
            raise
        await self.continue_generation()

    async def abandon_update(self) -> None:
        if self._sessions is not False:
            with suppress(RapoError):
                await self.post("/end_weight_update", {})
        await self._try_to_continue()

    async def join_group(self, meeting: Meeting, first_rank: int, *, timeout: float) -> None:
        body = {
            "master_address": meeting.address,
            "master_port": meeting.port,
            "rank_offset": first_rank,
            "world_size": meeting.size,
            "group_name": meeting.name,
            "backend": meeting.backend,
        }
        await self.post("/init_weights_update_group", body, timeout=timeout)

    async def receive_bucket(
        self, layout: Sequence[TensorMetadata], group: str, version: int | None, *, timeout: float
    ) -> None:
        body = {
            **piece(version),
            "names": [tensor.name for tensor in layout],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in layout],
            "shapes": [list(tensor.shape) for tensor in layout],
            "group_name": group,
            "load_format": "flattened_bucket",
        }
        await self.post("/update_weights_from_distributed", body, timeout=timeout)

    async def receive_handles(
        self, named: Sequence[tuple[str, Tensor]], ranks: int, version: int | None, *, timeout: float
    ) -> None:
        body = {**piece(version), "serialized_named_tensors": [handles(named) for _ in range(ranks)]}
        await self.post("/update_weights_from_tensor", body, timeout=timeout)

    async def load_checkpoint(self, model_path: Path, version: int) -> None:
        """As `Engine.load_checkpoint`.

        It takes no session: SGLang prepares and finishes a checkpoint's weights by itself.
        """
        body = {
            **piece(version),
            "model_path": str(model_path.resolve()),
            "abort_all_requests": False,
        }
        path = "/update_weights_from_disk"
        try:
            await self._quiesce()
            answer = await self.post(path, body)
            if not isinstance(answer, dict) or "success" not in answer:
                raise self._exchange.malformed(path, "no success", answer)
        except EngineLost:
            raise
        except RapoError:
            await self._try_to_continue()
            raise
        await self.continue_generation()

    async def has_sessions(self) -> bool:
        """Whether updates stand between begin and end (SGLang from 0.5.21 on); asked once."""
        if self._sessions is None:
            # A route that wants POST answers GET with 405.
            status = await self._exchange.status("GET", "/begin_weight_update", timeout=self._control_timeout)
            self._sessions = status != 404
        return self._sessions

    async def post(self, path: str, body: Any, *, timeout: float | None = None) -> Any:
        """The JSON answer to a JSON body, `timeout` seconds later at most; None: those of the client."""
        if timeout is not None:
            return await self._exchange.json("POST", path, body, timeout=timeout)
        remedy = "raise rollout.request_timeout_s, or ask for less at once (rollout.prompts_per_request)"
        return await self._exchange.json("POST", path, body, timeout=self._timeout, when_late=remedy)

    async def _quiesce(self) -> None:
        await self.pause("retract")
        await self.flush_cache()

    async def _try_to_continue(self) -> None:
        with suppress(RapoError):  # the server may be gone by now
            await self.continue_generation()

    async def _begin_session(self) -> None:
        path, body = "/begin_weight_update", {"selector": "all"}
        try:
            await self.post(path, body)
        except EngineLost:
            raise
        except RapoError:  # one is open: the trainer that began it is gone
            with suppress(RapoError):  # the embedded server reports what that one lacked
                await self.post("/end_weight_update", {})
            await self.post(path, body)

    async def _tell(self, path: str, body: Any) -> None:
        """Posts what is answered with no more than a status."""
        await self._exchange.request("POST", path, body, timeout=self._control_timeout)


def piece(version: int | None) -> dict[str, Any]:
    """What each request for weights has; the engine's version changes with the last one only."""
    named = {} if version is None else {"weight_version": str(version)}
    return {**named, "flush_cache": False}
