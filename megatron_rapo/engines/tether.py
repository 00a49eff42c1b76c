"""`python -m megatron_rapo.engines.tether PID COMMAND…`: runs a command that must not outlive process PID.

SGLang and vLLM are families of processes, none of which watches who started it. The tether does, and
ends them all: on SIGTERM, with PID, and when the command itself ends and leaves some of them. It removes
files that they leave in shared memory (SGLang 0.5.21 always does), and exits as the command did. If the
tether is killed, the kernel kills the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

POLL_S = 0.2
# From the request to end to the kill, and on until processes that clean up after the others (shared memory)
# are killed too. Together less than `servers.TERMINATE_WAIT_S`.
END_WAIT_S = 3.0
CLEANUP_WAIT_S = 0.5
# How often it notes what the family has in shared memory: whose a file was cannot be told afterwards.
NOTE_S = 2.0
# SGLang's names, those of Python's multiprocessing, which vLLM uses, and those of vLLM's ranks on CPUs.
SHARED_MEMORY = Path("/dev/shm")
NAMES = ("sglang_", "sgl_", "psm_", "sem.mp-", "vllm_dist_")
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Runs the command; see the module."""
    owner, command = int(sys.argv[1]), sys.argv[2:]
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: asked.append(n))
    process = subprocess.Popen(command, process_group=0, preexec_fn=_die_with_this_process)
    files: set[str] = set()
    noted = -NOTE_S
    while process.poll() is None and os.getppid() == owner and not asked:
        if time.monotonic() - noted > NOTE_S:
            files |= _shared_memory_of(process.pid)
            noted = time.monotonic()
        time.sleep(POLL_S)
    files |= _shared_memory_of(process.pid)
    _end_group(process)
    for file in files:
        Path(file).unlink(missing_ok=True)
    code = process.returncode
    if code < 0:  # as the command did
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    return code


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Asks the command and its children to end, and kills what does not."""
    _signal_group(process.pid, signal.SIGTERM)
    _wait(lambda: process.poll() is not None, END_WAIT_S)
    process.kill()
    process.wait()
    _wait(lambda: not _signal_group(process.pid, 0), CLEANUP_WAIT_S)
    _signal_group(process.pid, signal.SIGKILL)


def _shared_memory_of(group: int) -> set[str]:
    """The engine's own files in shared memory that processes of this group have open or mapped."""
    held: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if os.getpgid(int(process.name)) == group:
                held.update(_held_by(process))
    with os.scandir(SHARED_MEMORY) as files:
        return {file.path for file in files if file.name.startswith(NAMES) and file.inode() in held}


def _held_by(process: Path) -> Iterator[int]:
    """Inodes of what it has in shared memory. A semaphore is told by no name: libc renames what it made."""
    folder = f"{SHARED_MEMORY}/"
    for line in (process / "maps").read_text().splitlines():
        if folder in line:
            yield int(line.split()[4])
    for opened in (process / "fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if str(opened.readlink()).startswith(folder):
                yield opened.stat().st_ino


def _signal_group(group: int, number: int) -> bool:
    """Whether the group still had a process to send the signal to."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


def _wait(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _die_with_this_process() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
