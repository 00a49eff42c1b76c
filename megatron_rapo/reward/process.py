"""One verifier process, seen from the trainer."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time

from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.errors import RapoError
from megatron_rapo.reward.worker import READY, REFUSED, STARTUP_LIMIT_S

_REAP_LIMIT_S = 30.0  # seconds for the kernel to end a process after SIGKILL

logger = logging.getLogger(__name__)


class VerifierProcess:
    """A process that is starting, idle, or verifying exactly one item.

    It is an interpreter of its own (not a fork, nor multiprocessing's spawn): safe beside the trainer's
    threads and CUDA context, startable from daemonic processes, and it does not import the trainer's main
    module. It ends when this object's end of the connection is closed, be it by the trainer's death.

    Attributes:
        connection: readable when `collect` has something to say.
        deadline: `time.monotonic()` at which the process must have spoken.
    """

    def __init__(self, address: str, time_limit_s: float) -> None:
        self._address = address
        self._time_limit_s = time_limit_s
        self._ready = False
        self._verifying = False
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            command = ["-P", "-m", "megatron_rapo.reward.worker", str(theirs.fileno()), address]
            self._process = subprocess.Popen(
                [sys.executable, *command, str(time_limit_s)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # The same modules as here; and the same hash seed in every process and run, since the
                # order of sets can decide what SymPy tries first.
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                    "PYTHONHASHSEED": "0",
                },
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

    def submit(self, response: str | None, answer: str) -> None:
        """Hands over one item; its time starts now.

        Raises:
            BrokenPipeError: the process died while it was idle; the item is not to blame.
        """
        self.connection.send((response, answer))
        self._verifying = True
        self.deadline = time.monotonic() + self._time_limit_s

    def collect(self) -> Verification | None:
        """Takes what the process has to say: a verification, or None if it has just become ready.

        `alive` then tells whether the process survived it.

        Raises:
            RapoError: the process cannot start, or its verifier decided by something else than a bool.
        """
        try:
            word, why = self.connection.recv()
        except (EOFError, ConnectionError):
            return self._collect_death()
        if word == READY:
            self._ready = True
            return None
        if not self._ready:
            raise self._cannot_start(why)
        self._verifying = False
        if word == REFUSED:
            raise RapoError(f"the verifier {self._address} {why}")
        if word.outcome is Outcome.CRASH:
            logger.info("a verification raised %s", word.why)
        return word

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
        """Ends the process at once and waits until it is gone."""
        self.connection.close()
        self._process.kill()
        self._process.wait(_REAP_LIMIT_S)

    def _collect_death(self) -> Verification:
        status = self._process.wait(_REAP_LIMIT_S)
        self.connection.close()
        if not self._ready:
            raise self._cannot_start(f"it ended with status {status}")
        if status == -signal.SIGALRM:  # it ended itself, before the trainer could
            return self._timeout()
        logger.info("a verifier process died with status %d", status)
        return Verification(Outcome.CRASH, why=f"its process died with status {status}")

    def _timeout(self) -> Verification:
        return Verification(Outcome.TIMEOUT, why=f"not done within {self._time_limit_s:g} s")

    def _cannot_start(self, why: str) -> RapoError:
        return RapoError(
            f"the verifier {self._address} cannot start: {why}; "
            "see its output above, and check that the package's requirements are installed"
        )
