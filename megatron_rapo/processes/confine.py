"""Confines this process for good: what it may touch, and how much of it. Nothing here needs privileges."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.processes import landlock, seccomp

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 36, 38
_CAPABILITY_VERSION_3 = 0x20080522
_READ_ANY = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: files of root's that Landlock lets through
_OPEN_FILES = 128

# What Python and its libraries read, beside themselves.
_SYSTEM = (
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types"),
    *("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/proc/cpuinfo", "/sys/devices/system/cpu"),
)


@dataclass(frozen=True)
class Confinement:
    """What a process may do.

    Attributes:
        folder: its own, in which it may write.
        readable: further places that it may read.
        network: whether it may open sockets.
        processes: whether it may start others, and send them signals.
        files: whether it may open any file that its user may.
        file_bytes: the size of a file that it writes; None: any.
        cpu_s: seconds of CPU, in all; None: any.
    """

    folder: Path
    readable: Sequence[Path] = ()
    network: bool = False
    processes: bool = False
    files: bool = False
    file_bytes: int | None = None
    cpu_s: int | None = None


def lacking(confinement: Confinement) -> list[str]:
    """What this machine lacks to confine a process so."""
    found = []
    if not seccomp.is_available():
        found.append("seccomp filters (Linux 4.14 on x86-64 or ARM64)")
    if not confinement.files and not landlock.version():
        found.append("Landlock (Linux 5.13, and not switched off)")
    return found


def confine(confinement: Confinement) -> None:
    """Confines this process, and what it starts.

    Raises:
        OSError: the kernel refuses it.
    """
    end_with_parent()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what it starts stays below it, where it can be found
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    if confinement.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past it is an error, as Python's own default
        _limit(resource.RLIMIT_FSIZE, confinement.file_bytes)
    if confinement.cpu_s is not None:
        _limit(resource.RLIMIT_CPU, confinement.cpu_s, grace=1)  # SIGXCPU tells; who ignores it is killed
    if not confinement.files:
        landlock.restrict(
            readable=[*map(Path, _SYSTEM), *python_places(), *confinement.readable],
            writable=[confinement.folder],
        )
    _drop_capabilities()
    seccomp.install(network=confinement.network, processes=confinement.processes, files=confinement.files)


def end_with_parent() -> None:
    """Has the kernel kill this process once the thread that made it has ended, be it by a kill."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def python_places() -> list[Path]:
    """Where Python, installed packages and this one lie; no other folder of sources."""
    installed = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    linked = [
        found for place in installed if place.is_dir() for found in place.iterdir() if found.is_symlink()
    ]
    return [Path(__file__).parents[1], Path(sys.prefix), Path(sys.base_prefix), *installed, *linked]


def _limit(which: int, value: int, grace: int = 0) -> None:
    _, ceiling = resource.getrlimit(which)
    most = value + grace if ceiling == resource.RLIM_INFINITY else min(value + grace, ceiling)
    resource.setrlimit(which, (min(value, most), most))


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def _drop_capabilities() -> None:
    """Root's privileges but to read; of another user there are none to drop."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    held = ctypes.create_string_buffer(24)
    if libc.capget(header, held):
        raise OSError(ctypes.get_errno(), "capget")
    _, permitted, _, _, _, _ = struct.unpack("6I", held.raw)
    kept = permitted & _READ_ANY
    if libc.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")
