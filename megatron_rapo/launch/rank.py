"""What runs in a rank's process around the rank's own function."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rapo.launch.failure import Failure, Kind
from megatron_rapo.launch.stop import requests

_PR_SET_PDEATHSIG = 1


def run_rank(
    function: Callable[..., object], args: tuple[Any, ...], rank: int, report: Path, parent: int
) -> None:
    """Runs `function(*args)`; an exception is written to `report` and ends the process with status 1.

    The process leads a group of its own, so that all it starts can be ended with it, and dies with `parent`.
    """
    os.setpgid(0, 0)
    _die_with(parent)
    faulthandler.enable()
    with requests.noted():
        try:
            function(*args)
        except SystemExit:
            raise
        except BaseException as error:
            failure = Failure.of(rank, error)
            if requests.number and failure.kind is Kind.COLLECTIVE:  # its peers ended sooner
                sys.exit(128 + requests.number)
            failure.write(report)
            sys.exit(1)


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent dies, however that happens. Linux only."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # It died before the call above.
        os.kill(os.getpid(), signal.SIGKILL)
