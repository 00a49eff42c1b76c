"""How vLLM is given weights: its own routes for weight transfer, with our backend behind them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from torch import Tensor

from megatron_rapo.engines.engine import Diagnose, Engine
from megatron_rapo.engines.exchange import CONTROL_TIMEOUT_S, POLL_S, Exchange
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.wire.bucket import TensorMetadata
from megatron_rapo.wire.group import Meeting
from megatron_rapo.wire.memory import share

RESET_TIMEOUT_S = 10.0  # that a server may take to let go of its cache


class VLLMUpdates(Engine):
    """The requests that change weights, and hold generation back meanwhile.

    Once an update has begun to bring tensors, a token can end the server: it generates again only after a
    whole update. Until then it stays paused, also where the update is abandoned.
    """

    def __init__(
        self, http: httpx.AsyncClient, url: str, *, timeout: float, diagnose: Diagnose | None = None
    ) -> None:
        """See `engine.Connect`."""
        self._exchange = Exchange(http, url, diagnose)
        self._timeout, self._control_timeout = timeout, min(timeout, CONTROL_TIMEOUT_S)
        self._started = False  # this update has
        self._broken = False  # only a whole update makes it of use again

    @property
    def url(self) -> str:
        return self._exchange.url

    async def flush_cache(self) -> None:
        await self._reset_cache("")

    async def begin_update(self) -> None:
        """As `Engine.begin_update`. Requests under way are kept, and go on with new keys and values."""
        try:
            await self._tell("/pause?mode=keep")
            self._started, self._broken = False, await self._abandon()
        except EngineLost:
            raise  # nothing more is asked of it: each request would take its time
        except RapoError:
            await self.abandon_update()
            raise

    async def end_update(self, version: int) -> None:
        if not self._started:
            raise RapoError(f"{self.url} got no weights between the begin and the end of an update")
        body = {"weight_version": str(version)}
        await self._exchange.json("POST", "/finish_weight_update", body, timeout=self._timeout)
        self._started = self._broken = False
        await self._reset_cache("?reset_running_requests=true")  # the cache outlives an update
        await self._tell("/resume")

    async def abandon_update(self) -> None:
        """As `Engine.abandon_update`; where tensors have come, it stays paused until a whole update."""
        if not self._broken:
            with suppress(RapoError):  # the server may be gone by now
                await self._tell("/resume")

    async def join_group(self, meeting: Meeting, first_rank: int, *, timeout: float) -> None:
        invitation = {
            "address": meeting.address,
            "port": meeting.port,
            "name": meeting.name,
            "backend": meeting.backend,
            "first_rank": first_rank,
            "size": meeting.size,
            "timeout_s": timeout,
        }
        body = {"init_info": invitation}
        await self._exchange.json("POST", "/init_weight_transfer_engine", body, timeout=timeout)

    async def receive_bucket(
        self, layout: Sequence[TensorMetadata], group: str, version: int | None, *, timeout: float
    ) -> None:
        told = [[one.name, str(one.dtype).removeprefix("torch."), list(one.shape)] for one in layout]
        await self._take({"layout": told, "group": group}, timeout)

    async def receive_handles(
        self, named: Sequence[tuple[str, Tensor]], ranks: int, version: int | None, *, timeout: float
    ) -> None:
        await self._take({"shared": share(named)}, timeout)

    async def load_checkpoint(self, model_path: Path, version: int) -> None:
        await self.begin_update()
        try:
            await self._take({"folder": str(model_path.resolve())}, self._timeout)
        except EngineLost:
            raise
        except RapoError:
            await self.abandon_update()
            raise
        await self.end_update(version)

    async def _abandon(self) -> bool:
        """Ends an update that is open, maybe of a trainer that is gone; whether it had begun to load."""
        path, body = "/collective_rpc", {"method": "rapo_abandon"}
        answer = await self._exchange.json("POST", path, body, timeout=self._control_timeout)
        try:
            whole = [one["whole"] for one in answer["results"]]
        except (KeyError, TypeError):
            raise self._exchange.malformed(path, "no results", answer) from None
        if not all(isinstance(one, bool) for one in whole):
            raise self._exchange.malformed(path, "results of another worker", answer)
        return not all(whole)

    async def _take(self, piece: dict[str, Any], timeout: float) -> None:
        """Has it load a piece, and begin the update before the first."""
        if not self._started:
            self._started = self._broken = True
            await self._tell("/start_weight_update", {})
        await self._exchange.json("POST", "/update_weights", {"update_info": piece}, timeout=timeout)

    async def _reset_cache(self, how: str) -> None:
        """Asks again and again, RESET_TIMEOUT_S seconds at most: what runs holds parts of it."""
        deadline = time.monotonic() + RESET_TIMEOUT_S
        while True:
            try:
                return await self._tell(f"/reset_prefix_cache{how}")
            except EngineLost:
                raise
            except RapoError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(POLL_S)

    async def _tell(self, path: str, body: Any = None) -> None:
        await self._exchange.json("POST", path, body, timeout=self._control_timeout)
