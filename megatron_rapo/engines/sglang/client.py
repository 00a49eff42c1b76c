"""One engine over SGLang's HTTP contract (0.5.14 to 0.5.23, and the embedded server)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from megatron_rapo.engines.exchange import Diagnose, Exchange, NoSuchRoute
from megatron_rapo.errors import EngineLost, RapoError

HEALTH_TIMEOUT_S = 5.0
POLL_S = 0.1  # between two questions whether the server is ready
CONTROL_TIMEOUT_S = 60.0  # for requests that are answered at once
FLUSH_TIMEOUT_S = 10.0  # that a server may take to become idle

MemoryTag = Literal["weights", "kv_cache"]


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself.

    Attributes:
        model_path: the folder that it was started with, or last loaded.
        weight_version: of its weights, as it spells it; `default` until the first update.
        tensor_parallel: the ranks that its weights are spread over.
        dtype: of its weights; `auto` is the checkpoint's.
        takes_slices: whether it has `/update_weights_from_shards`, an extension of SGLang's contract.
        one_request_at_a_time: whether it serves one request after the other, as the embedded server does.
        update_sessions: whether updates stand between begin and end (SGLang from 0.5.21 on).
        software: its name and version.
    """

    model_path: str
    weight_version: str
    tensor_parallel: int
    dtype: str
    takes_slices: bool
    one_request_at_a_time: bool
    update_sessions: bool
    software: str


class EngineClient:
    """Requests to one server. Each is bounded in time.

    All raise `EngineLost` where the server is gone, late, fails inside or sends what no engine sends, and a
    plain `RapoError` where it refuses. Answers are never streamed: a group counts once it is complete, and an
    event a token costs more than the token.

    Args:
        http: where connections come from; shared by the clients of a pool.
        url: the server's address, http://HOST:PORT.
        timeout: seconds for the answer to one `generate`, `post` or `update_weights_from_disk`.
        diagnose: asked for the reason when the connection fails.
    """

    def __init__(
        self, http: httpx.AsyncClient, url: str, *, timeout: float, diagnose: Diagnose | None = None
    ) -> None:
        self._exchange = Exchange(http, url, diagnose)
        self._timeout = timeout
        self._sessions: bool | None = None  # None: not asked yet
        self._sizes: dict[str | None, int] = {}  # prompts of each request under way that has an id

    @property
    def url(self) -> str:
        """The server's address."""
        return self._exchange.url

    async def until_healthy(self, timeout: float) -> None:
        """Waits until the server is ready, `timeout` seconds at most."""
        deadline = time.monotonic() + timeout
        while problem := await self._exchange.health_problem(
            max(POLL_S, min(HEALTH_TIMEOUT_S, deadline - time.monotonic()))
        ):
            if reason := self._exchange.diagnosis():
                raise EngineLost(f"{self.url} did not become ready: {reason}")
            if time.monotonic() > deadline:
                raise EngineLost(
                    f"{self.url} was not ready within {timeout:g} s ({problem}); look into the server's log, "
                    "or raise rollout.startup_timeout_s"
                )
            await asyncio.sleep(POLL_S)

    async def silence(self, patience: float) -> str | None:
        """Why the server says nothing to a question that costs it nothing; None if it answers, in any way.

        SGLang answers /health by generating, which waits while kernels are compiled or memory is released.
        """
        try:
            await self._exchange.status("GET", "/model_info", timeout=min(HEALTH_TIMEOUT_S, patience))
        except EngineLost as error:
            return str(error)
        return None

    async def info(self) -> EngineInfo:
        """What the server is, and which weights it has now."""
        model = await self._ask("GET", "/model_info")
        server = await self._ask("GET", "/server_info")
        try:
            return EngineInfo(
                model_path=str(model["model_path"]),
                weight_version=str(model["weight_version"]),
                tensor_parallel=int(server["tp_size"]),
                dtype=str(server["dtype"]),
                takes_slices=bool(server.get("takes_slices", False)),
                one_request_at_a_time=bool(server.get("one_request_at_a_time", False)),
                update_sessions=await self._has_sessions(),
                # Only SGLang does not give its name.
                software=f"{server.get('server', 'sglang')} {server.get('version', 'of unknown version')}",
            )
        except (KeyError, TypeError, ValueError) as error:
            answers = {"/model_info": model, "/server_info": server}
            raise self._exchange.malformed("", f"something that lacks {error}", answers) from None

    async def weight_version(self) -> str:
        """The version of the weights that the server has now, as it spells it."""
        info = await self._ask("GET", "/model_info")
        try:
            return str(info["weight_version"])
        except (KeyError, TypeError):
            raise self._exchange.malformed("/model_info", "no weight_version", info) from None

    async def weights_checksum(self) -> tuple[str, dict[str, int]] | None:
        """The version of the weights, and `tensor_checksum` of each under its HF name, in the engine's type.

        None from an engine that has no such route: it is the embedded server's own.
        """
        path = "/weights_checksum"
        try:
            answer = await self._ask("GET", path, timeout=self._timeout)
        except NoSuchRoute:
            return None
        try:
            checksums = {name: int(value) for name, value in answer["checksums"].items()}
            return str(answer["weight_version"]), checksums
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._exchange.malformed(path, "no checksums", answer) from None

    async def generate(
        self,
        input_ids: Sequence[Sequence[int]],
        sampling_params: Sequence[dict[str, Any]],
        rid: str | None = None,
    ) -> list[dict[str, Any]]:
        """One response a prompt, in order, with log-probs: SGLang's answers as they are.

        Args:
            input_ids: the prompts' token ids.
            sampling_params: one for each prompt.
            rid: what `abort` knows the request by, while it is under way.
        """
        body = {"input_ids": input_ids, "sampling_params": sampling_params, "return_logprob": True}
        if rid is not None:
            body["rid"] = rid
            self._sizes[rid] = len(input_ids)
        try:
            answers = await self.post("/generate", body)
        finally:
            self._sizes.pop(rid, None)
        if not isinstance(answers, list) or len(answers) != len(input_ids):
            raise self._exchange.malformed("/generate", f"not a list of {len(input_ids)} responses", answers)
        return answers

    async def abort(self, rid: str | None = None) -> None:
        """Ends a request, or all, with what they have: their finish_reason is `abort`."""
        if rid is None:
            return await self._tell("/abort_request", {"abort_all": True})
        # SGLang knows each prompt of a batch by an id of its own, and the batch by none.
        for number in range(self._sizes.get(rid, 0)):
            await self._tell("/abort_request", {"rid": f"{rid}_{number}"})
        return None

    async def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Holds generation back. Requests under way are ended, or go on after `continue_generation`."""
        await self._tell("/pause_generation", {"mode": mode})

    async def continue_generation(self) -> None:
        """Undoes `pause`."""
        await self._tell("/continue_generation", {})

    async def flush_cache(self) -> None:
        """Forgets the keys and values of earlier requests, once the server is idle or paused.

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

    async def release_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Gives memory back; the server must be idle or paused. Released weights are lost."""
        await self._tell("/release_memory_occupation", {"tags": list(tags)})

    async def resume_memory(self, tags: Sequence[MemoryTag]) -> None:
        """Takes it again. Weights hold nothing of use until an update has brought all of them."""
        await self._tell("/resume_memory_occupation", {"tags": list(tags)})

    async def post(self, path: str, body: Any, *, timeout: float | None = None) -> Any:
        """The JSON answer to a JSON body, for the routes of weights.

        Args:
            path: of the route, `/update_weights_from_tensor` say.
            body: its fields.
            timeout: seconds; those of the client where None.
        """
        if timeout is not None:
            return await self._exchange.json("POST", path, body, timeout=timeout)
        remedy = "raise rollout.request_timeout_s, or ask for less at once (rollout.prompts_per_request)"
        return await self._exchange.json("POST", path, body, timeout=self._timeout, when_late=remedy)

    async def begin_update(self) -> None:
        """Makes the server ready for weights: requests wait, no cache is left, the update is open.

        In this order, since SGLang 0.5.21 can die of an update that itself flushes the cache just after a
        request has ended. What fails is undone.
        """
        try:
            await self._quiesce()
            if await self._has_sessions():
                await self._begin_session()
        except RapoError:
            await self.abandon_update()
            raise

    async def end_update(self) -> None:
        """Closes the update, and lets requests through again."""
        try:
            if await self._has_sessions():
                await self.post("/end_weight_update", {})
        except RapoError:
            await self._try_to_continue()
            raise
        await self.continue_generation()

    async def abandon_update(self) -> None:
        """After a failure: `end_update` as far as the server takes part. The failure is the one to report."""
        if self._sessions is not False:
            with suppress(RapoError):
                await self.post("/end_weight_update", {})
        await self._try_to_continue()

    async def update_weights_from_disk(self, model_path: Path, weight_version: str) -> None:
        """A whole update: loads the safetensors checkpoint in `model_path`, which the server can read.

        It takes no session: SGLang prepares and finishes a checkpoint's weights by itself.
        """
        body = {
            "model_path": str(model_path.resolve()),
            "weight_version": weight_version,
            "flush_cache": False,
            "abort_all_requests": False,
        }
        path = "/update_weights_from_disk"
        try:
            await self._quiesce()
            answer = await self.post(path, body)
            if not isinstance(answer, dict) or "success" not in answer:
                raise self._exchange.malformed(path, "no success", answer)
        except RapoError:
            await self._try_to_continue()
            raise
        await self.continue_generation()

    async def _quiesce(self) -> None:
        await self.pause("retract")
        await self.flush_cache()

    async def _try_to_continue(self) -> None:
        with suppress(RapoError):  # the server may be gone by now
            await self.continue_generation()

    async def _has_sessions(self) -> bool:
        if self._sessions is None:
            # A route that wants POST answers GET with 405.
            status = await self._exchange.status("GET", "/begin_weight_update", timeout=CONTROL_TIMEOUT_S)
            self._sessions = status != 404
        return self._sessions

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

    async def _ask(self, method: str, path: str, *, timeout: float = CONTROL_TIMEOUT_S) -> Any:
        return await self._exchange.json(method, path, timeout=timeout)

    async def _tell(self, path: str, body: Any, *, timeout: float = CONTROL_TIMEOUT_S) -> None:
        """Posts what is answered with no more than a status."""
        await self._exchange.request("POST", path, body, timeout=timeout)
