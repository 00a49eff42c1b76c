"""What runs in a rank's process around the rank's own function."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.launch.failure import Failure, Kind
from megatron_rapo.launch.stop import ASKING, AT_ONCE, requests

# Blocked as the process begins, until it can heed them.
HEEDED = {*ASKING, AT_ONCE}
_PR_SET_PDEATHSIG = 1
# The exit status of a rank that gives up: to start again may help (sysexits.h, EX_TEMPFAIL).
GIVEN_UP = 75

_report: Path | None = None  # where the launcher of this process looks for why it ended


def run_rank(call: bytes, place: RankEnvironment, report: Path, parent: int) -> None:
    """Runs a pickled call; an exception is written to `report` and ends the process with status 1.

    The process leads a group of its own, so that all it starts can be ended with it, and dies with `parent`.
    """
    global _report
    _report = report
    os.setpgid(0, 0)
    die_with(parent)
    os.environ.update(place.variables())
    faulthandler.enable()
    with requests.noted():
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HEEDED)
            function, args = pickle.loads(call)
            function(*args)
        except SystemExit:
            raise
        except BaseException as error:
            failure = Failure.of(place.rank, error)
            if requests.number and failure.kind is Kind.COLLECTIVE:  # its peers ended sooner
                sys.exit(128 + requests.number)
            failure.write(report)
            sys.exit(1)


def give_up(rank: int, text: str) -> NoReturn:
    """Ends this process at once, from any thread, as one that hangs; its launcher ends the others.

    Args:
        rank: this one.
        text: why, for people. Under torchrun and srun it is printed.
    """
    if _report is not None:
        Failure(rank, Kind.HUNG, time.time(), text).write(_report)
    else:
        print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(GIVEN_UP)


def die_with(parent: int) -> None:
    """The kernel kills this process when its parent dies, however that happens. Linux only."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # It died before the call above.
        os.kill(os.getpid(), signal.SIGKILL)
