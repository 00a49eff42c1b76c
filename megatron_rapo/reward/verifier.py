"""Judges responses in processes that can be killed."""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import connection
from types import TracebackType
from typing import NamedTuple

from megatron_rapo.config.reward import Reward
from megatron_rapo.config.verifiers import RewardPlan
from megatron_rapo.episode.outcome import Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.reward.process import VerifierProcess


class _Item(NamedTuple):
    """A response, or None for the problem's gold answer, and who waits for what is found.

    `again`: whether a process was killed from outside over it. That may be none of its doing, so it is judged
    once more.
    """

    response: str | None
    problem: Problem
    found: Future[Verification]
    again: bool = False


class Verifier:
    """A pool of processes in which responses are judged, with a hard time limit for each.

    ```python
    with Verifier(built_in("math"), workers=2, time_limit_s=5.0) as verifier:
        [verification] = verifier.verify([("… is \\boxed{4}.", problem)])
        verification = await verifier.score("… is \\boxed{4}.", problem)
    ```
    Each process holds one item at a time, so that what kills or hangs it costs that item alone; the process
    is then replaced, and the start of the new one is charged to no item. A thread of its own serves the
    processes: threads and event loops may ask at the same time. An error closes the pool.

    Args:
        plan: what judges (`RunConfig.verifier_of`).
        workers: processes.
        time_limit_s: wall-clock seconds for one response.
        memory_limit_gib: address space of a process, in GiB.

    Raises:
        RapoError: a function cannot be imported, or takes other arguments.
    """

    def __init__(
        self, plan: RewardPlan, *, workers: int, time_limit_s: float, memory_limit_gib: float = 4.0
    ) -> None:
        self._new = lambda: VerifierProcess(plan, time_limit_s, memory_limit_gib)
        self._processes: list[VerifierProcess] = []
        self._waiting: deque[_Item] = deque()
        self._lock = threading.Lock()  # of what waits, and whether more may
        self._closed = False
        self._bell, self._ear = socket.socketpair()
        try:
            for _ in range(workers):
                self._processes.append(self._new())
            while not all(process.ready for process in self._processes):
                self._next_verifications()
        except BaseException:
            self._end()
            raise
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="verifier", daemon=True)
        self._thread.start()

    @classmethod
    def configured(cls, plan: RewardPlan, options: Reward) -> Verifier:
        """One with the limits that the configuration sets."""
        return cls(
            plan,
            workers=options.workers,
            time_limit_s=options.time_limit_s,
            memory_limit_gib=options.memory_limit_gib,
        )

    def verify(self, items: Sequence[tuple[str, Problem]]) -> list[Verification]:
        """Judges (response text, problem) pairs, in the items' order.

        Raises:
            RapoError: a process that was to replace a killed one cannot start, or a function returned what
                is no reward.
            RuntimeError: the pool is closed.
        """
        return self._results(items)

    def judge(self, golds: Sequence[str]) -> list[Verification]:
        """Verifies of each gold answer a response that gives it; correct where the verifier knows of none."""
        return self._results([(None, Problem(id="", question="", answer=gold)) for gold in golds])

    async def score(self, response: str, problem: Problem) -> Verification:
        """Judges one response. For any event loop; raises what `verify` does."""
        [found] = self._enqueue([(response, problem)])
        return await asyncio.wrap_future(found)

    def close(self) -> None:
        """Ends every process; may be called again."""
        with self._lock:
            self._closed = True
        self._ring()
        self._thread.join()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _results(self, items: Sequence[tuple[str | None, Problem]]) -> list[Verification]:
        try:
            # The last is waited for first: each wait that ends in between would take time from the thread.
            return [found.result() for found in reversed(self._enqueue(items))][::-1]
        except BaseException:
            self.close()
            raise

    def _enqueue(self, items: Iterable[tuple[str | None, Problem]]) -> list[Future[Verification]]:
        asked = [_Item(response, problem, Future()) for response, problem in items]
        with self._lock:
            if self._closed:
                raise RuntimeError("this Verifier is closed; score inside its `with` block")
            self._waiting.extend(asked)
        self._ring()
        return [item.found for item in asked]

    def _ring(self) -> None:
        """Wakes the thread that serves."""
        with suppress(BlockingIOError, OSError):  # it has not heard the last ones yet, or has ended
            self._bell.send(b"\0")

    def _serve(self) -> None:
        """The thread: hands items out and takes what is found, until the pool is closed or fails."""
        under_way: dict[VerifierProcess, _Item] = {}
        failure: BaseException = RuntimeError("this Verifier was closed meanwhile")
        try:
            while not self._closed:
                self._hand_out(under_way)
                for process, verification in self._next_verifications():
                    item = under_way.pop(process)
                    if process.killed and not item.again:
                        self._waiting.appendleft(item._replace(again=True))
                    else:
                        item.found.set_result(verification)
        except BaseException as error:
            failure = error
        with self._lock:
            self._closed = True
        self._end()
        for item in [*under_way.values(), *self._waiting]:
            if item.found.running() or item.found.set_running_or_notify_cancel():
                item.found.set_exception(failure)

    def _hand_out(self, under_way: dict[VerifierProcess, _Item]) -> None:
        for place, process in enumerate(self._processes):
            while process.idle and (item := self._next_item()) is not None:
                under_way[process] = item
                try:
                    process.submit(item.response, item.problem)
                except BrokenPipeError:  # it died while idle: the item is for another
                    del under_way[process]
                    self._waiting.appendleft(item)
                    self._replace(place)
                    break
                except (pickle.PicklingError, TypeError, AttributeError) as error:
                    raise RapoError(
                        f"problem {item.problem.id} cannot be handed to the processes that judge responses: "
                        f"{error}; let its columns hold plain values"
                    ) from error

    def _next_item(self) -> _Item | None:
        """The first that waits, and that its asker has not given up."""
        while self._waiting:
            item = self._waiting.popleft()
            if item.found.running() or item.found.set_running_or_notify_cancel():
                return item
        return None

    def _next_verifications(self) -> list[tuple[VerifierProcess, Verification]]:
        """Waits until there is something to do, and replaces processes that ended."""
        busy = [process for process in self._processes if not process.idle]
        soonest = min((process.deadline for process in busy), default=float("inf"))
        timeout = None if not busy else max(soonest - time.monotonic(), 0.0)
        spoken = connection.wait([self._ear, *(process.connection for process in busy)], timeout)
        if self._ear in spoken:
            self._ear.recv(4096)
        verified = []
        for place, process in enumerate(self._processes):
            if process not in busy:
                continue
            if process.connection in spoken:
                verification = process.collect()
            elif time.monotonic() >= process.deadline:
                verification = process.expire()
            else:
                continue
            if verification is not None:
                verified.append((process, verification))
            if not process.alive:
                self._replace(place)
        return verified

    def _replace(self, place: int) -> None:
        self._processes[place].kill()
        self._processes[place] = self._new()

    def _end(self) -> None:
        while self._processes:
            self._processes.pop().kill()
        self._bell.close()
        self._ear.close()
