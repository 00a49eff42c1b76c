"""Scores responses in processes that can be killed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection
from types import TracebackType

from megatron_rapo.config.verifiers import verifier_address
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.reward.process import VerifierProcess


class Verifier:
    """A pool of verifier processes with a hard time limit for each verification.

    ```python
    with Verifier("math", workers=2, time_limit_s=5.0) as verifier:
        outcomes = verifier.score([("… is \\boxed{4}.", "4")])
    ```
    Each process holds one item at a time, so that what kills or hangs it costs that item alone; the process
    is then replaced, and the start of the new one is charged to no item. An error in `score` closes the
    pool. Not for use from several threads at once.

    Args:
        name: `math`, `countdown` or `integer` (`RunConfig.verifier`).
        workers: processes.
        time_limit_s: wall-clock seconds for one verification.

    Raises:
        RapoError: the verifier does not exist or cannot start.
    """

    def __init__(self, name: str, *, workers: int, time_limit_s: float) -> None:
        self._address = verifier_address(name)
        self._time_limit_s = time_limit_s
        self._processes: list[VerifierProcess] = []
        try:
            for _ in range(workers):
                self._processes.append(VerifierProcess(self._address, time_limit_s))
            while not all(process.ready for process in self._processes):
                self._next_verifications()
        except BaseException:
            self.close()
            raise

    def score(self, items: Sequence[tuple[str, str]]) -> list[Outcome]:
        """The outcomes of `verify`."""
        return [verification.outcome for verification in self.verify(items)]

    def judge(self, golds: Sequence[str]) -> list[Verification]:
        """Verifies of each gold answer a response that gives it; correct where the verifier knows of none."""
        return self.verify([(None, gold) for gold in golds])

    def verify(self, items: Sequence[tuple[str | None, str]]) -> list[Verification]:
        """Verifies (response text, gold answer) pairs, in the items' order; without a response as `judge`.

        Raises:
            RapoError: a process that was to replace a killed one cannot start, or the verifier returned
                something else than a bool.
            RuntimeError: the pool is closed.
        """
        if not self._processes:
            raise RuntimeError("this Verifier is closed; score inside its `with` block")
        verified: dict[int, Verification] = {}
        waiting = deque(range(len(items)))
        verifying: dict[VerifierProcess, int] = {}
        try:
            while len(verified) < len(items):
                for process in list(self._processes):
                    if waiting and process.idle and self._submit(process, items[waiting[0]]):
                        verifying[process] = waiting.popleft()
                for process, verification in self._next_verifications():
                    verified[verifying.pop(process)] = verification
        except BaseException:
            self.close()
            raise
        return [verified[index] for index in range(len(items))]

    def close(self) -> None:
        """Ends every process; may be called again."""
        while self._processes:
            self._processes.pop().kill()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, process: VerifierProcess, item: tuple[str | None, str]) -> bool:
        """Whether the process took the item; one that died while idle is replaced instead."""
        try:
            process.submit(*item)
        except BrokenPipeError:
            self._replace(process)
            return False
        return True

    def _next_verifications(self) -> list[tuple[VerifierProcess, Verification]]:
        """Waits until a process has spoken or has passed its deadline, and replaces those that ended."""
        busy = [process for process in self._processes if not process.idle]
        soonest = min(process.deadline for process in busy)
        spoken = connection.wait([process.connection for process in busy], soonest - time.monotonic())
        verified = []
        for process in busy:
            if process.connection in spoken:
                verification = process.collect()
            elif time.monotonic() >= process.deadline:
                verification = process.expire()
            else:
                continue
            if verification is not None:
                verified.append((process, verification))
            if not process.alive:
                self._replace(process)
        return verified

    def _replace(self, process: VerifierProcess) -> None:
        process.kill()
        self._processes[self._processes.index(process)] = VerifierProcess(self._address, self._time_limit_s)
