"""What the embedded server does with its requests: one after the other, in one worker thread."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_rapo.errors import RapoError
from megatron_rapo.rollout.embedded.decode import Completion, Sample
from megatron_rapo.rollout.embedded.engine import Engine

T = TypeVar("T")


class Service:
    """The engine, the thread that works it, and the requests under way.

    One request is one decoding batch and no two requests share one, so that an answer is determined, bit for
    bit, by its request and the weights.

    Attributes:
        engine: None until it is loaded.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._requests: dict[str, threading.Event] = {}  # unanswered ones, each with what aborts it
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

        Returns:
            The completions, and the version of the weights that made them.

        Raises:
            RapoError: another request under way has this id.
        """
        engine = self.loaded_engine()
        key = rid or uuid.uuid4().hex
        if key in self._requests:
            raise RapoError(f"rid {key!r} is that of a request under way; send another, or none")
        aborted = self._requests[key] = threading.Event()
        try:
            await self._admitting.wait()
            return await self._work(lambda: (engine.generate(samples, aborted), engine.weight_version))
        finally:
            aborted.set()  # cancelled, too: nobody waits for what the worker still decodes
            del self._requests[key]

    async def update_weights(self, path: Path, weight_version: str | None) -> None:
        """Loads other weights, after the requests that the worker already has."""
        engine = self.loaded_engine()
        await self._work(lambda: engine.update_weights(path, weight_version))

    async def idle(self, timeout: float) -> bool:
        """Waits until the worker has nothing to do; False if it still has after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while self._jobs and loop.time() < deadline:
            await asyncio.sleep(0.01)
        return not self._jobs

    def pause(self) -> None:
        """Holds back requests that the worker does not have yet."""
        self._admitting.clear()

    def resume(self) -> None:
        """Lets them through again."""
        self._admitting.set()

    def abort(self, rid: str | None = None) -> None:
        """Ends the request of this id, or all, with what they have; an unknown id is no error."""
        for key, aborted in self._requests.items():
            if rid in (None, key):
                aborted.set()

    def close(self) -> None:
        """Ends all work and the worker."""
        self.abort()
        self._worker.shutdown(cancel_futures=True)

    async def _work(self, job: Callable[[], T]) -> T:
        future = self._worker.submit(job)
        self._jobs.add(future)
        future.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(future)
