"""System calls that a confined process is refused, by a seccomp filter in the kernel's own language (BPF).

It needs no privilege and no library, cannot be lifted again, and holds in containers. Refused are: sockets,
further processes and programs, signals and limits of other processes, another's memory, files' modes and
owners (which Landlock does not cover), memory that outlives or evades the limits, and interfaces around the
filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column below

# (x86_64, aarch64); None: it has no such call. Numbers: arch/x86/entry/syscalls/syscall_64.tbl of Linux, and
# include/uapi/asm-generic/unistd.h.
_PROCESSES = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
}
_NETWORK = {"socket": (41, 198), "io_uring_setup": (425, 425)}
_FILES = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "truncate": (76, 45),  # Landlock covers it from Linux 6.2 on
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
}
_ALWAYS = {
    "setrlimit": (160, 164),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
}
# Refused by their arguments, or answered otherwise.
_CLONE, _CLONE3, _TGKILL, _SOCKETPAIR = (56, 220), (435, 435), (234, 131), (53, 199)
_PRLIMIT, _PRCTL, _SECCOMP = (302, 261), (157, 167), (317, 277)

_CLONE_THREAD, _PR_SET_PDEATHSIG = 0x00010000, 1
_NO_STREAM = 0x6  # in a socket's type: datagrams, which one of a pair may send elsewhere
_X32 = 0x40000000  # calls of x86_64's third interface, which would pass by number
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|…, BPF_RET
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def is_available() -> bool:
    """Whether the kernel takes such a filter, and this machine's calls are known here."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    action = ctypes.c_uint32(_ERROR)
    get_action_avail = 2
    return _libc().syscall(_here(_SECCOMP), get_action_avail, 0, ctypes.byref(action)) == 0


def install(*, network: bool, processes: bool, files: bool) -> None:
    """Refuses such calls from now on, to every thread of this process and to what it starts.

    Args:
        network: whether sockets are left.
        processes: whether further processes, programs and signals are.
        files: whether modes and owners of files are.

    Raises:
        OSError: the kernel does not take it.
    """
    program = b"".join(_program(network=network, processes=processes, files=files))
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    set_mode_filter, of_all_threads = 1, 1
    if _libc().syscall(_here(_SECCOMP), set_mode_filter, of_all_threads, fprog):
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")


def _program(*, network: bool, processes: bool, files: bool) -> Iterator[bytes]:
    architecture, _ = _ARCHITECTURES[platform.machine()]
    yield _statement(_LOAD, _ARCH)
    yield _jump(_EQUAL, architecture, 1, 0)
    yield _statement(_RETURN, _KILL)
    yield _statement(_LOAD, _NUMBER)
    yield from _refused(_AT_LEAST, _X32, errno.ENOSYS)
    refused = {**_ALWAYS, **({} if network else _NETWORK), **({} if files else _FILES)}
    if not processes:
        refused |= _PROCESSES
        yield from _refused(_EQUAL, _here(_CLONE3), errno.ENOSYS)  # glibc then asks for clone
        yield from _on(_here(_CLONE), 0, _jump(_ANY_BIT, _CLONE_THREAD, 1, 0))
        yield from _on(_here(_TGKILL), 0, _jump(_EQUAL, os.getpid(), 1, 0))
    if not network:
        yield from _on(_here(_SOCKETPAIR), 1, _jump(_ANY_BIT, _NO_STREAM, 0, 1))
    yield from _on(_here(_PRLIMIT), 2, _jump(_EQUAL, 0, 1, 0), halves=2)  # to read limits, not to set them
    yield from _on(_here(_PRCTL), 0, _jump(_EQUAL, _PR_SET_PDEATHSIG, 0, 1))
    for numbers in refused.values():
        if (number := numbers[_column()]) is not None:
            yield from _refused(_EQUAL, number, errno.EPERM)
    yield _statement(_RETURN, _ALLOW)


def _refused(test: int, number: int, error: int) -> Iterator[bytes]:
    yield _jump(test, number, 0, 1)
    yield _statement(_RETURN, _ERROR | error)


def _on(number: int, argument: int, test: bytes, *, halves: int = 1) -> Iterator[bytes]:
    """Refuses the call unless each 32-bit half of the argument passes the test, which skips a statement."""
    yield _jump(_EQUAL, number, 0, 3 * halves + 1)
    for half in range(halves):
        yield _statement(_LOAD, _FIRST_ARGUMENT + 8 * argument + 4 * half)
        yield test
        yield _statement(_RETURN, _ERROR | errno.EPERM)
    yield _statement(_RETURN, _ALLOW)


def _statement(code: int, value: int) -> bytes:
    return struct.pack("HBBI", code, 0, 0, value)


def _jump(code: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _column() -> int:
    return _ARCHITECTURES[platform.machine()][1]


def _here(numbers: tuple[int, int]) -> int:
    return numbers[_column()]


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
