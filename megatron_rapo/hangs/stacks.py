"""The Python stacks of a rank, written to a file of its own when SIGQUIT comes, whatever it is doing then.

The signal's handler is faulthandler's: it needs no lock of the interpreter, so that a rank which waits in
native code with that lock is seen as well. It shows the thread that it interrupts, the main one: others may
be running, and to read their frames would end the process. All threads are shown by `Stacks.write`, whose
thread has the lock. Only a process that is stopped (SIGSTOP) or stuck in the kernel writes nothing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

ASKING = signal.SIGQUIT  # as in other runtimes: `kill -QUIT PID` shows where a rank is
FRAMES = 12  # innermost ones that are shown

_LAUNCHER = re.compile(r"launch/rank\.py\", line \d+ in run_rank$")
_THREAD = re.compile(r"^(?:Current thread|Thread) (0x[0-9a-f]+)")
_INTERRUPTED = "Stack (most recent call first):"


@dataclass(frozen=True)
class Where:
    """A rank's process, and where its main thread was.

    Attributes:
        stack: lines of the newest stack, innermost frame first; empty where none was written.
    """

    rank: int
    host: str
    pid: int
    stack: tuple[str, ...]

    @property
    def state(self) -> str:
        """What the kernel says of the process, where it is one of this machine: `sleeping`, `stopped`."""
        if self.host != socket.gethostname():
            return ""
        try:
            return psutil.Process(self.pid).status()
        except psutil.NoSuchProcess:
            return "gone"


class Stacks:
    """The file of this rank's stacks."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self) -> None:
        """Writes those of all threads, none of which runs meanwhile."""
        faulthandler.dump_traceback(self._file, all_threads=True)


@contextmanager
def stacks_to(folder: Path, rank: int) -> Iterator[Stacks]:
    """Meanwhile SIGQUIT has this process write its stacks to a file in `folder`, removed if none came."""
    path = _path(folder, rank)
    main = threading.main_thread().ident or 0
    header = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "main": main}
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(header) + "\n")
        file.flush()
        empty = path.stat().st_size
        faulthandler.register(ASKING, file, all_threads=False)
        try:
            yield Stacks(file)
        finally:
            faulthandler.unregister(ASKING)
            # SIGQUIT's own action would end the process: a late one is of no more interest.
            signal.signal(ASKING, signal.SIG_IGN)
            if path.stat().st_size == empty:
                path.unlink()


def ask_for_stacks(folder: Path, missing: set[int]) -> None:
    """Signals those of these ranks that run on this machine."""
    for rank in missing:
        where = read_stack(folder, rank)
        if where is not None and where.host == socket.gethostname() and not where.stack:
            with suppress(ProcessLookupError):
                os.kill(where.pid, ASKING)


def read_stack(folder: Path, rank: int) -> Where | None:
    """What the rank's file says; None where it has none."""
    try:
        header, _, dumps = _path(folder, rank).read_text(encoding="utf-8", errors="replace").partition("\n")
        fields = json.loads(header)
    except (FileNotFoundError, ValueError):
        return None
    return Where(fields["rank"], fields["host"], fields["pid"], tuple(_main_thread(dumps, fields["main"])))


def _main_thread(dumps: str, ident: int) -> list[str]:
    """The frames of the main thread in the newest dump, but for those of the launcher."""
    frames: list[str] = []
    inside = False
    for line in dumps.splitlines():
        if (found := _THREAD.match(line)) or line == _INTERRUPTED:
            inside = found is None or int(found[1], 16) == ident
            frames = [] if inside else frames
        elif _LAUNCHER.search(line):
            inside = False
        elif inside and line.startswith("  "):
            frames.append(line.strip())
    return frames[:FRAMES]


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.stack"
