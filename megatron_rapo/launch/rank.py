"""What runs in a rank's process around the rank's own function."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_rapo.launch.failure import Failure

CLOSING_S = 15.0  # SLURM kills what has not ended after 30
_PR_SET_PDEATHSIG = 1


def run_rank(
    function: Callable[..., object], args: tuple[Any, ...], rank: int, report: Path, parent: int
) -> None:
    """Runs `function(*args)`; an exception is written to `report` and ends the process with status 1.

    The process leads a group of its own, so that all it starts can be ended with it, and dies with `parent`.
    """
    os.setpgid(0, 0)
    _die_with(parent)
    signal.signal(signal.SIGTERM, _exit)
    faulthandler.enable()
    try:
        function(*args)
    except SystemExit:
        raise
    except BaseException as error:
        Failure.of(rank, error).write(report)
        sys.exit(1)


def close_on_sigterm() -> None:
    """On SIGTERM this process, which no launcher of ours watches, ends with status 143.

    It ends through its `finally` blocks; where they take longer than CLOSING_S, at once.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Written to as the signal comes, also while the main thread is in a call that heeds none.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_the_late, args=(reading,), daemon=True).start()
    signal.signal(signal.SIGTERM, _exit)


def _end_the_late(signals: int) -> None:
    """What this process started ends with it, as after SIGKILL."""
    while os.read(signals, 1)[0] != signal.SIGTERM:
        pass
    time.sleep(CLOSING_S)
    os._exit(128 + signal.SIGTERM)


def _exit(number: int, _: FrameType | None) -> None:
    """Ends the process through its `finally` blocks: servers and verifiers that it started are closed."""
    raise SystemExit(128 + number)


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent dies, however that happens. Linux only."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # It died before the call above.
        os.kill(os.getpid(), signal.SIGKILL)
