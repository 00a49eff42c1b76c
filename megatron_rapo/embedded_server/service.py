"""What the embedded server does with its requests: one after the other, in one worker thread."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

from megatron_rapo.embedded_server.broadcast import UpdateGroups
from megatron_rapo.embedded_server.decode import Completion, Sample
from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.embedded_server.sender_memory import SenderMemory
from megatron_rapo.errors import RapoError

T = TypeVar("T")


@dataclass(eq=False)
class _Request:
    """A request that has not been answered."""

    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    """It ends with what it has."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Ends what the worker decodes of it: since it is aborted, or to be made anew after a pause."""

    def abort(self) -> None:
        self.aborted.set()
        self.stop.set()


class Service:
    """The engine, the thread that works it, and the requests under way.

    One request is one decoding batch and no two requests share one, so that an answer is determined, bit for
    bit, by its request and the weights.

    Attributes:
        engine: None until it is loaded.
        groups: what it has joined to receive weights.
        sender_memory: what it was given handles of.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.groups = UpdateGroups()
        self.sender_memory = SenderMemory()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._requests: dict[str, _Request] = {}
        self._jobs: set[Future[Any]] = set()  # what the worker has not finished

    def load(self, make_engine: Callable[[], Engine]) -> Future[None]:
        """Starts to load the engine; returns at once."""

        def job() -> None:
            self.engine = make_engine()

        return self._worker.submit(job)

    def loaded_engine(self) -> Engine:
        """The engine; an error where it is asked for too early."""
        if self.engine is None:
            raise RuntimeError("the engine is not loaded")
        return self.engine

    async def generate(self, samples: list[Sample], rid: str | None) -> tuple[list[Completion], str]:
        """Makes the responses, once earlier requests are done and the server is not paused.

        A batch that a pause has stopped is made anew, so that one version of the weights has made all of it.

        Returns:
            The completions, and the version of the weights that made them.

        Raises:
            RapoError: another request under way has this id, or the engine cannot generate now.
        """
        engine = self.loaded_engine()
        key = rid or uuid.uuid4().hex
        if key in self._requests:
            raise RapoError(f"rid {key!r} is that of a request under way; send another, or none")
        request = self._requests[key] = _Request()
        try:
            while True:
                await self._admitted(request)
                completions, version = await self.work(partial(_generate, engine, samples, request.stop))
                unfinished = any(completion.finish == "abort" for completion in completions)
                if request.aborted.is_set() or not unfinished:
                    return completions, version
        finally:
            request.abort()  # cancelled, too: nobody waits for what the worker still decodes
            del self._requests[key]

    async def _admitted(self, request: _Request) -> None:
        """Waits until the request may run; one that is aborted need not wait."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._admitting, request.aborted)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def work(self, job: Callable[[], T]) -> T:
        """Has the worker do this after what it already has to do: for all that touches the engine."""
        future = self._worker.submit(job)
        self._jobs.add(future)
        future.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(future)

    async def idle(self, timeout: float) -> bool:
        """Waits until the worker has nothing to do; False if it still has after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while self._jobs and loop.time() < deadline:
            await asyncio.sleep(0.01)
        return not self._jobs

    def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Holds back requests that the worker does not have yet; see `PauseRequest` for those that it has."""
        self._admitting.clear()
        if mode == "abort":
            self.abort()
        elif mode == "retract":
            for request in self._requests.values():
                request.stop.set()
                request.stop = threading.Event()

    def resume(self) -> None:
        """Lets them through again."""
        self._admitting.set()

    def abort(self, rid: str | None = None) -> None:
        """Ends the request of this id, or all, with what they have; an unknown id is no error.

        KEY_NUMBER is a prompt of a batch: a batch is one, and ends as a whole.
        """
        for key, request in self._requests.items():
            if rid is None or key in (rid, rid.rpartition("_")[0]):
                request.abort()

    def close(self) -> None:
        """Ends all work. It does not wait: a broadcast that never comes must not keep the process."""
        self.abort()
        self._worker.shutdown(wait=False, cancel_futures=True)


def _generate(engine: Engine, samples: list[Sample], stop: threading.Event) -> tuple[list[Completion], str]:
    return engine.generate(samples, stop), engine.weight_version
