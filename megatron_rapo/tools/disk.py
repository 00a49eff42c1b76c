"""What a tool's process keeps on disk, measured from outside: no quota is to be had without privileges."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path

MOST_ENTRIES = 10_000  # files and folders in a process's own
EVERY_S = 0.25
_SHARE = 0.05  # of the time that measuring may take


async def outgrown(folder: Path, pid: int, limit: int) -> None:
    """Returns once the process keeps more than `limit` bytes.

    It measures every quarter of a second, or less often where that takes long.
    """
    pause = EVERY_S
    while True:
        await asyncio.sleep(pause)
        began = time.monotonic()
        if await asyncio.to_thread(is_larger, folder, pid, limit):
            return
        pause = max(EVERY_S, (time.monotonic() - began) / _SHARE)


def is_larger(folder: Path, pid: int, limit: int) -> bool:
    """Whether the files below the folder, and those that the process removed but has open, take more bytes.

    So it is where there are more than `MOST_ENTRIES`, or a folder is too deep, or closed, to be measured.
    """
    size, entries = _removed(pid), 0
    folders = [str(folder)]
    while folders:
        try:
            with suppress(FileNotFoundError), os.scandir(folders.pop()) as found:  # removed meanwhile
                for entry in found:
                    entries += 1
                    with suppress(FileNotFoundError):
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
                        else:
                            size += entry.stat(follow_symlinks=False).st_size
                    if size > limit or entries > MOST_ENTRIES:
                        return True
        except OSError:
            return True
    return size > limit


def _removed(pid: int) -> int:
    """Bytes of files that no folder has any more."""
    size = 0
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as descriptors:
        for descriptor in descriptors:
            with suppress(OSError):
                found = descriptor.stat()
                size += found.st_size if found.st_nlink == 0 else 0
    return size
