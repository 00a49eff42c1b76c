"""What a test must not leave behind: processes, and files of shared memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000


@contextmanager
def nothing_left(within: float = 10.0) -> Iterator[None]:
    """Fails if what runs inside leaves a child process, or (where the test may mount) shared memory."""
    has_own = has_shared_memory_of_its_own()
    children, files = _children(), _shared_memory()
    yield
    deadline = time.monotonic() + within
    while (left := _children() - children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, [" ".join(process.cmdline()) for process in left]
    while (new := _shared_memory() - files) and has_own and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not (has_own and new), f"files left in {SHARED_MEMORY}: {sorted(new)}"


@cache
def has_shared_memory_of_its_own() -> bool:
    """Gives this process and those it starts a /dev/shm apart from the machine's, which others use as well.

    For the rest of the test session: it is asked as one begins, as what is in the old one cannot be removed
    by its name from then on. False where that is not permitted.
    """
    libc = ctypes.CDLL(None)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    return libc.mount(b"tmpfs", bytes(SHARED_MEMORY), b"tmpfs", 0, None) == 0


def _children() -> set[psutil.Process]:
    return {
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
    }


def _shared_memory() -> set[str]:
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()
