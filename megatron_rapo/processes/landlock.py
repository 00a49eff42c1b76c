"""Files that a confined process may open, by Landlock (Linux 5.13): it needs no privilege, and stays."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

# include/uapi/linux/landlock.h; the numbers of its calls are the same on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_REMOVE = 0x10 | 0x20
_MAKE_FILES = 0x80 | 0x100 | 0x1000  # directories, files, symbolic links
_MAKE_OTHERS = 0x40 | 0x200 | 0x400 | 0x800  # devices, sockets, pipes
_REFER, _TRUNCATE = 0x2000, 0x4000  # from versions 2 and 3 on
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE  # what a rule of a file, not a folder, may have


def version() -> int:
    """The kernel's version of Landlock; 0 where it has none, or does not use it."""
    return max(_syscall(_CREATE_RULESET, None, 0, _ASK_VERSION), 0)


def restrict(*, readable: Iterable[Path], writable: Iterable[Path]) -> None:
    """Lets this thread, and what it starts from now on, open nothing but what lies below these places.

    Args:
        readable: places to read, and to map libraries from; what does not exist is passed over.
        writable: places to read and write.

    Raises:
        OSError: the kernel has no Landlock.
    """
    known = version()
    handled = _EXECUTE | _WRITE_FILE | _READ_FILE | _READ_DIR | _REMOVE | _MAKE_FILES | _MAKE_OTHERS
    handled |= (_REFER if known >= 2 else 0) | (_TRUNCATE if known >= 3 else 0)
    ruleset = _checked(_syscall(_CREATE_RULESET, struct.pack("Q", handled), 8, 0))
    try:
        reading = _EXECUTE | _READ_FILE | _READ_DIR
        for place in readable:
            _admit(ruleset, place, reading)
        for place in writable:
            _admit(ruleset, place, handled & ~_MAKE_OTHERS)
        _checked(_syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _admit(ruleset: int, place: Path, access: int) -> None:
    try:
        descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it is not there, so there is nothing to open
        return
    try:
        allowed = access if place.is_dir() else access & _OF_FILES
        _checked(_syscall(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", allowed, descriptor), 0))
    finally:
        os.close(descriptor)


def _syscall(*arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc.syscall(*arguments)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
