"""A kind of engines from outside the package: `kind = "toy_kind:Toy"`."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from megatron_rapo.engines.engine import Diagnose, Engine, EngineInfo, Generated, Generation
from megatron_rapo.engines.exchange import Exchange
from megatron_rapo.engines.kind import EngineKind, Served
from megatron_rapo.engines.launching import Launch, Launcher
from megatron_rapo.errors import EngineLost, RapoError


class ToyEngine(Engine):
    """One toy server. It takes weights as files, and is told their name at the end of an update."""

    def __init__(
        self, http: httpx.AsyncClient, url: str, *, timeout: float, diagnose: Diagnose | None = None
    ) -> None:
        self._exchange = Exchange(http, url, diagnose)
        self._timeout = timeout

    @property
    def url(self) -> str:
        return self._exchange.url

    async def _tell(self, what: str, timeout: float | None = None, **words: Any) -> Any:
        body = {"what": what, **words}
        return await self._exchange.json("POST", "/", body, timeout=timeout or self._timeout)

    async def until_healthy(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while problem := await self.silence(timeout):
            if self._exchange.diagnosis() or time.monotonic() > deadline:
                raise EngineLost(problem)
            await asyncio.sleep(0.05)

    async def silence(self, patience: float) -> str | None:
        try:
            await self._tell("state", patience)
        except EngineLost as error:
            return str(error)
        return None

    async def info(self) -> EngineInfo:
        state = await self._tell("state")
        return EngineInfo(state["folder"], state["name"], 1, "float32", "toy 1")

    async def weight_version(self) -> str:
        return str((await self._tell("state"))["name"])

    async def generate(
        self, wanted: Sequence[Generation], *, timeout: float | None = None
    ) -> list[Generated]:
        prompts = [[one.token_ids[0], one.seed or 0, one.max_tokens] for one in wanted]
        return [
            Generated(
                np.array(said["ids"]), np.full(len(said["ids"]), -0.25, np.float32), (said["by"],), "stop"
            )
            for said in await self._tell("say", timeout, prompts=prompts)
        ]

    async def flush_cache(self) -> None:
        """It has none."""

    async def release_memory(self) -> None:
        """It keeps what it has."""

    async def resume_memory(self) -> None:
        """It has it still."""

    async def begin_update(self) -> None:
        await self._tell("change")

    async def end_update(self, version: int) -> None:
        await self._tell("changed", name=str(version))

    async def abandon_update(self) -> None:
        await self._tell("changed", name="broken")

    async def join_group(self, *_: Any, **__: Any) -> None:
        raise RapoError(f'{self.url} joins no group; use weights.transport = "tensor"')

    async def receive_bucket(self, *_: Any, **__: Any) -> None:
        raise RapoError(f'{self.url} takes no broadcast; use weights.transport = "tensor"')

    async def receive_handles(
        self, named: Sequence[tuple[str, Tensor]], ranks: int, version: int | None, *, timeout: float
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "bucket.safetensors"
            save_file({name: values.float().contiguous() for name, values in named}, file)
            await self._tell("take", timeout, file=str(file))

    async def load_checkpoint(self, model_path: Path, version: int) -> None:
        await self._tell("read", folder=str(model_path), name=str(version))


@dataclass(frozen=True)
class ToyLauncher:
    """How a toy server is started."""

    python: str
    model_path: Path
    name: str = "toy server"

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        server = Path(__file__).with_name("toy_server.py")
        return Launch([self.python, str(server), str(port), str(self.model_path), str(os.getpid())])


class Toy(EngineKind):
    """Toy servers."""

    connect = ToyEngine

    class Options(EngineKind.Options):
        python: str = Field(sys.executable, description="Interpreter of the servers.")

    options: Options

    def launcher(self, served: Served) -> Launcher:
        return ToyLauncher(self.options.python, served.model_path)


class Given(EngineKind):
    """Toy servers that someone else starts."""

    connect = ToyEngine


NO_KIND = "toy"
