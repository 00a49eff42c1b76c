"""One verifier process, seen from the trainer."""

from __future__ import annotations

import json
import logging
import multiprocessing
import signal
import time
from dataclasses import asdict

from megatron_rapo.config.reward import TAKEN
from megatron_rapo.config.verifiers import RewardPlan
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.processes.interpreter import REAP_LIMIT_S, end_process, start_interpreter
from megatron_rapo.reward.worker import FAILED, LAST, READY, REFUSED, STARTUP_LIMIT_S

logger = logging.getLogger(__name__)


class VerifierProcess:
    """A process that is starting, idle, or verifying exactly one item.

    It ends when this object's end of the connection is closed, be it by the trainer's death.

    Attributes:
        connection: readable when `collect` has something to say.
        deadline: `time.monotonic()` at which the process must have spoken.
        killed: whether SIGKILL ended it, which nothing of ours sends to one that is still listened to.
    """

    def __init__(self, plan: RewardPlan, time_limit_s: float, memory_limit_gib: float) -> None:
        self._plan = plan
        self._time_limit_s = time_limit_s
        self._ready = False
        self._verifying = False
        self.killed = False
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            arguments = [_in_json(plan), str(time_limit_s), str(memory_limit_gib)]
            self._process = start_interpreter(
                "megatron_rapo.reward.worker", arguments, theirs.fileno(), code=plan.code
            )
        self.deadline = time.monotonic() + STARTUP_LIMIT_S

    @property
    def idle(self) -> bool:
        """Whether `submit` may be called."""
        return self._ready and not self._verifying

    @property
    def ready(self) -> bool:
        """Whether the process has started."""
        return self._ready

    def submit(self, response: str | None, problem: Problem) -> None:
        """Hands over one item; its time starts now.

        Raises:
            BrokenPipeError: the process died while it was idle; the item is not to blame.
        """
        self.connection.send((response, problem))
        self._verifying = True
        self.deadline = time.monotonic() + self._time_limit_s

    def collect(self) -> Verification | None:
        """Takes what the process has to say: a verification, or None if it has just become ready.

        `alive` then tells whether the process survived it.

        Raises:
            RapoError: the process cannot start, or a function returned what is no reward.
        """
        try:
            word, told = self.connection.recv()
        except (EOFError, ConnectionError):
            return self._collect_death()
        if word in (FAILED, REFUSED):
            raise RapoError(told)
        if word == READY:
            self._ready = True
            return None
        self._verifying = False
        if word == LAST:
            self.kill()
        if told.outcome is Outcome.CRASH:
            logger.info("a verification failed: %s", told.why)
        return told

    def expire(self) -> Verification:
        """Kills the process, which has passed its deadline.

        Raises:
            RapoError: it was still starting.
        """
        self.kill()
        if not self._ready:
            raise self._cannot_start(f"it did not start within {STARTUP_LIMIT_S:.0f} s")
        return self._timeout()

    @property
    def alive(self) -> bool:
        """Whether the process can take further items."""
        return not self.connection.closed

    def kill(self) -> None:
        """Ends the process, and what it started, at once, and waits until it is gone."""
        self.connection.close()
        end_process(self._process)

    def _collect_death(self) -> Verification:
        status = self._process.wait(REAP_LIMIT_S)
        self.connection.close()
        if not self._ready:
            raise self._cannot_start(f"its process ended with status {status}")
        self.killed = status == -signal.SIGKILL
        if status == -signal.SIGALRM:  # it ended itself, before the trainer could
            return self._timeout()
        logger.info("a verifier process died with status %d", status)
        return Verification(Outcome.CRASH, why=f"its process died with status {status}")

    def _timeout(self) -> Verification:
        return Verification(Outcome.TIMEOUT, why=f"not done within {self._time_limit_s:g} s")

    def _cannot_start(self, why: str) -> RapoError:
        named = ", ".join(f'{part.option} = "{part}"' for part in self._plan.parts)
        return RapoError(f"{named} cannot be imported: {why}; see its output above, and mend it")


def _in_json(plan: RewardPlan) -> str:
    """What `Functions` takes."""
    code = [str(folder) for folder in plan.code]
    parts = [asdict(part) for part in plan.parts]
    return json.dumps({"parts": parts, "correct_at": plan.correct_at, "code": code, "taken": TAKEN})
