"""`python keeper.py FD GRACE COMMAND…`: runs a command, and ends all that it started with it.

The command inherits descriptor FD. It is ended once standard input is closed, and so when whoever started the
keeper is gone, however that ended: it may end by itself for GRACE seconds first. All its descendants stay
below the keeper, as the kernel hands it those whose parents have ended, and are killed with it. If the keeper
itself is killed, the kernel kills the command; what that had started then stays. It imports nothing
but Python's own library, so that it starts at once, and in the command's environment.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

KILL_LIMIT_S = 10.0
"""Seconds for the kernel to end what is killed."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main() -> int:
    """Runs the command; see the module. Its status, as a shell tells it."""
    descriptor, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    for number in (signal.SIGINT, signal.SIGTERM):  # of a whole group; the owner decides
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        pass_fds=[descriptor],
        start_new_session=True,
        preexec_fn=_die_with_this_process,
    )
    os.close(descriptor)
    ended = os.pidfd_open(process.pid)
    select.select([ended, 0], [], [])
    select.select([ended], [], [], grace_s)
    _kill_all()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _kill_all() -> None:
    """Kills all descendants, and what they start meanwhile."""
    deadline = time.monotonic() + KILL_LIMIT_S
    while (left := _descendants()) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _descendants() -> list[int]:
    """Those that have not ended; their parents may have, since this process gets their children then."""
    children: dict[int, list[int]] = {}
    ended = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it is gone meanwhile
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            children.setdefault(int(parent), []).append(int(entry.name))
            if state == "Z":
                ended.add(int(entry.name))
    found, parents = [], [os.getpid()]
    while parents:
        below = children.get(parents.pop(), [])
        found += below
        parents += below
    return [pid for pid in found if pid not in ended]


def _die_with_this_process() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
