"""A folder that a command writes to: its own while it runs, and named in an error where its disk fails."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from megatron_rapo.errors import RapoError

LOCK = ".lock"
# A file server keeps the locks of a machine that was lost for a while: 90 s is NFSv4's usual lease.
OTHER_HOST_WAIT_S = 100.0
POLL_S = 0.2

# What a disk fails with, also where the exception names no file (a flush, a write to an open one).
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_held: set[Path] = set()


@contextmanager
def own_folder(folder: Path, name: str) -> Iterator[None]:
    """Makes the folder, and keeps other processes that would write there out of it meanwhile.

    Args:
        folder: what is written to.
        name: of the option that gives it, for errors.

    Raises:
        RapoError: another process has it, or it cannot be made or written to.
    """
    with writing_to(folder, name):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, f"{name} = {folder}"):
            yield


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """A POSIX record lock on a file that is made for it; the kernel frees it however the process ends.

    It holds between the machines of a network file system that passes locks on (NFS does). Where a file
    system has none, a warning says so, and nothing is kept out.

    Args:
        file: whose text names the holder. It is removed at the end.
        what: is locked, for errors.

    Raises:
        RapoError: another process holds it.
    """
    file = file.absolute()
    if file in _held:  # a second lock would succeed, and its end would free the first
        raise RapoError(f"{what} is written to by this very process already; choose another folder")
    descriptor = _acquire(file, what)
    _held.add(file)
    try:
        os.ftruncate(descriptor, 0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
        yield
    finally:
        _held.remove(file)
        file.unlink(missing_ok=True)  # before it is freed: who opens it from now on makes a new one
        os.close(descriptor)


@contextmanager
def writing_to(folder: Path, name: str) -> Iterator[None]:
    """Turns what the folder's disk fails with into an error that names it; other errors pass.

    Raises:
        RapoError: its disk is full or broken, or the folder takes no files.
    """
    try:
        yield
    except OSError as error:
        if not _concerns(error, folder):
            raise
        raise RapoError(
            f"{name} = {folder} cannot be written to: {_describe(error, folder)}; make room there or mend it "
            "and run the same command again, or choose another folder"
        ) from error


@contextmanager
def writing_file(file: Path) -> Iterator[None]:
    """Names the file in what its disk fails with: a flush does not, and libraries have words of their own.

    Raises:
        OSError: as it was raised inside, with the file's name.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(file)) from error


def write_whole(file: Path, text: str) -> None:
    """Writes a file anew; a reader sees what stood there before or all of it, also where the disk is full.

    Raises:
        OSError: it cannot be written, with the file's name; what stood there is intact.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        with writing_file(file):
            partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _acquire(file: Path, what: str) -> int:
    """The locked file's descriptor. A holder on another machine may be gone: it is waited for."""
    deadline: float | None = None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(
                    f"warning: {file} cannot be locked ({error.strerror}), so nothing keeps a second process "
                    "out of this folder; see that there is none",
                    file=sys.stderr,
                )
                return descriptor
            holder = os.read(descriptor, 1000)
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            host, text = _holder(holder)
            if deadline is None:
                deadline = time.monotonic()
                if host not in ("", socket.gethostname()):
                    deadline += OTHER_HOST_WAIT_S
                    print(f"{what} is in use by {text}; waiting, should that machine be gone", flush=True)
            if time.monotonic() >= deadline:
                raise RapoError(
                    f"{what} is in use by {text}; wait for its end, end it, or choose another folder"
                ) from error
            time.sleep(POLL_S)
            continue
        if _is_at(descriptor, file):
            return descriptor
        os.close(descriptor)  # the holder before removed it meanwhile


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holder(text: bytes) -> tuple[str, str]:
    """The host, and who it is for people; it may just be about to write its name."""
    try:
        found = json.loads(text)
        host = str(found["host"])
        return host, f"process {found['pid']} on {host}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "", "another process"


def _concerns(error: OSError, folder: Path) -> bool:
    if error.filename is None:
        return error.errno in _DISK
    try:
        return Path(os.fsdecode(error.filename)).absolute().is_relative_to(folder.absolute())
    except (TypeError, ValueError):
        return False  # a descriptor's number


def _describe(error: OSError, folder: Path) -> str:
    told = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = folder.absolute() if error.filename is None else Path(os.fsdecode(error.filename)).absolute()
        existing = next(path for path in (place, *place.parents) if path.exists())
        told += f", with {shutil.disk_usage(existing).free >> 20} MiB free"
    return told if error.filename is None else f"{told} ({os.fsdecode(error.filename)})"
