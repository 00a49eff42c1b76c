"""Requests to stop, as a flag that the work looks at where it can save.

A handler that raises is not enough: Python drops what is raised inside a `__del__` or a callback, and the
process goes on. So a request is only noted while `deferring`; a second one, or the end of the grace, raises
in the main thread; and a process that does not come to its end even then is ended by a thread.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# A person asks, or torchrun, or a scheduler. Who sends SIGUSR1 keeps the time: there is no grace that ends.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# From a launcher to its ranks, and from the thread here to the main one.
AT_ONCE = signal.SIGUSR2
# How long a process that ends at once may take to close what it opened.
CLOSING_S = 10.0
# Schedulers signal a process and also the one that hands signals on to it: both mean one request.
ONE_REQUEST_S = 1.0
_POLL_S = 0.1


class StopRequests:
    """The stop signals of this process, of which there is one (`requests`).

    Attributes:
        number: the signal that asked; 0 until one does.
        last_words: called in another thread, with the reason, where the process ends without having heeded
            the request.
    """

    def __init__(self) -> None:
        self.number = 0
        self._asked = 0.0  # when
        self._ending = self._raised = False
        self._grace_s: float | None = None  # None: nothing is deferred
        self._heeded = False
        self.last_words: Callable[[str], None] = _say_nothing

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Meanwhile stop signals end the process through its `finally` blocks, or after CLOSING_S without.

        Its exit status is 128 and the signal's number then. To be entered in the main thread.

        Raises:
            SystemExit: a request, unless it is deferred.
        """
        self._raised = False
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # Written to as the signal comes, also while the main thread is in a call that heeds none.
        before_descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        numbers = [n for n in (*ASKING, AT_ONCE) if not _ignored(n)]
        before = {number: signal.signal(number, self._note) for number in numbers}
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        try:
            yield
        finally:
            self._raised = True
            if not self.number:  # else the process is at its end, and heeds no more signals
                for number, handler in before.items():
                    signal.signal(number, handler)
            signal.set_wakeup_fd(before_descriptor)
            os.close(writing)  # which ends the thread, unless it is to end the process

    @contextmanager
    def deferring(self, grace_s: float) -> Iterator[None]:
        """Meanwhile a request is a flag, `number`, until `grace_s` later; a second one ends at once.

        Args:
            grace_s: seconds. That of a request by SIGUSR1 has no end.

        Raises:
            SystemExit: a request came before.
        """
        self._grace_s = grace_s
        try:
            if self.number:
                raise SystemExit(128 + self.number)
            yield
            if self.number and not self._heeded:
                raise SystemExit(128 + self.number)
        finally:
            self._grace_s = None

    def heed(self) -> None:
        """The work saves and ends now, which may take its time."""
        self._grace_s, self._heeded = float("inf"), True

    def _note(self, number: int, _: FrameType | None) -> None:
        self._take(number)
        if self._ending and not self._raised:  # once: the second would cut short what the first has closed
            self._raised = True
            raise SystemExit(128 + self.number)

    def _take(self, number: int) -> None:
        if self.number == 0:
            self.number = signal.SIGTERM if number == AT_ONCE else number
            self._asked = time.monotonic()

    def _watch(self, signals: int) -> None:
        """Waits for a request, then for the end of its grace; ends what does not end by itself."""
        while (number := _next(signals, None)) not in (*ASKING, AT_ONCE):
            if number is None:
                os.close(signals)
                return
        self._take(number)
        reason = None if number == AT_ONCE else self._reason(signals)
        if reason is not None or not self._heeded:
            if number != AT_ONCE:  # else a peer failed, which is told
                self.last_words(reason or "a stop was asked for")
            self._ending = True
            signal.pthread_kill(threading.main_thread().ident or 0, AT_ONCE)
        time.sleep(CLOSING_S)
        os._exit(128 + self.number)  # what this process started ends with it, as after SIGKILL

    def _reason(self, signals: int) -> str | None:
        """Why the process is to end at once; None where it is ending already."""
        while (grace_s := self._grace_s) is not None:
            passed = time.monotonic() - self._asked
            if self.number != signal.SIGUSR1 and passed > grace_s:
                return f"its step did not end within {grace_s:g} s (checkpoint.stop_grace_s)"
            number = _next(signals, _POLL_S)
            if number == AT_ONCE or (number in ASKING and passed > ONE_REQUEST_S):
                return "it was asked again"
        return None


def _next(signals: int, timeout_s: float | None) -> int | None:
    """The next signal; None at the end of the time or of the pipe."""
    ready, _, _ = select.select([signals], [], [], timeout_s)
    data = os.read(signals, 1) if ready else b""
    return data[0] if data else None


def _ignored(number: int) -> bool:
    """`nohup` has SIGHUP ignored."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _say_nothing(_: str) -> None:
    pass


requests = StopRequests()
