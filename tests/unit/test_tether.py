"""The tether of a command: it ends as the command did, with all its family, and removes what that leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rapo.engines import tether

SOON = 20.0
HERE = Path("/dev/shm")

# Run by the tether of a process whose waits are short; what it prints is the test's.
QUICK = """
import sys
from megatron_rapo.engines import tether
tether.POLL_S, tether.NOTE_S, tether.END_WAIT_S, tether.CLEANUP_WAIT_S = 0.02, {note_s}, 0.5, 0.5
sys.exit(tether.main())
"""


def tethered(
    body: str, *, owner: int | None = None, note_s: float = 0.05, **options: Any
) -> subprocess.Popen[str]:
    """Python code under a tether of this process, or of another `owner`."""
    program = [sys.executable, "-c", QUICK.format(note_s=note_s), str(owner or os.getpid())]
    command = [sys.executable, "-c", textwrap.dedent(body)]
    return subprocess.Popen([*program, *command], stdout=subprocess.PIPE, text=True, **options)


def gone(pid: int) -> bool:
    """Whether a process ends soon, or is only to be reaped."""
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def files() -> Iterator[list[Path]]:
    """Files in shared memory: four with engines' names, and a stranger's."""
    mark = f"{os.getpid()}_{time.monotonic_ns()}"
    made = [HERE / f"{name}_{mark}" for name in ("sglang_x", "sgl_y", "psm_v", "vllm_dist_w", "other_z")]
    yield made
    for file in made:
        file.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ("raise SystemExit(0)", 0),
        ("raise SystemExit(1)", 1),
        ("raise SystemExit(7)", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)", -signal.SIGINT),
        ("os.abort()", -signal.SIGABRT),
    ],
)
def test_it_ends_as_the_command_did(ends: str, status: int) -> None:
    process = tethered(f"import os, signal, sys; print('said', flush=True); {ends}")
    assert process.communicate(timeout=SOON) == ("said\n", None)
    assert process.returncode == status


FAMILY = """
    import os, signal, subprocess, sys, time
    wait = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", wait], stdout=subprocess.PIPE)
    child.stdout.readline()
    {manner}
    print(os.getpid(), child.pid, os.getpgid(0), flush=True)
    {then}
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("manner", "status"),
    [
        ("", -signal.SIGTERM),
        ("signal.signal(15, lambda *_: sys.exit(5))", 5),
        ("signal.signal(15, signal.SIG_IGN)", -signal.SIGKILL),
    ],
)
def test_asked_to_end_it_asks_the_command_and_kills_what_stays(
    manner: str, status: int, number: signal.Signals
) -> None:
    process = tethered(FAMILY.format(manner=manner, then=""))
    assert process.stdout is not None
    command, child, group = map(int, process.stdout.readline().split())
    assert command == group != os.getpgid(process.pid)
    process.send_signal(number)
    assert process.wait(SOON) == status
    assert gone(command) and gone(child)
    process.stdout.close()


def test_a_command_that_ends_leaves_no_family() -> None:
    process = tethered(FAMILY.format(manner="", then="sys.exit(3)"))
    assert process.stdout is not None
    _, child, _ = map(int, process.stdout.readline().split())
    assert process.wait(SOON) == 3
    assert gone(child)
    process.stdout.close()


def test_it_ends_with_the_process_that_it_is_of() -> None:
    """Process 1 is not its parent: that one is gone, as far as it knows."""
    process = tethered("import os, time; print(os.getpid(), flush=True); time.sleep(60)", owner=1)
    assert process.wait(SOON) == -signal.SIGTERM
    process.communicate()


def test_where_the_tether_is_killed_so_is_the_command() -> None:
    process = tethered("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    assert process.stdout is not None
    command = int(process.stdout.readline())
    process.kill()
    assert process.wait(SOON) == -signal.SIGKILL
    assert gone(command)
    process.stdout.close()


@pytest.mark.parametrize("ends", ["", "os._exit(0)", "os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("keeps", ["open", "mapped"])
def test_files_of_engines_in_shared_memory_are_removed_and_no_others(
    files: list[Path], keeps: str, ends: str
) -> None:
    """Also where the command is gone before anyone could look at what it has."""
    for file in files:
        file.write_bytes(b"x")
    by_another = HERE / f"sglang_of_a_stranger_{os.getpid()}"
    body = f"""
    import mmap, os, time
    kept = []
    for name in {list(map(str, files))!r}:
        file = open(name, "r+b")
        kept.append(file if {keeps == "open"} else mmap.mmap(file.fileno(), 1))
        if not {keeps == "open"}:
            file.close()
    print("has them", flush=True)
    time.sleep({0.5 if ends else 60})
    {ends}
    """
    with by_another.open("wb"):
        try:
            process = tethered(body)
            assert process.stdout is not None and process.stdout.readline() == "has them\n"
            if not ends:
                process.terminate()
            process.wait(SOON)
            process.stdout.close()
            assert [file.exists() for file in files] == [False, False, False, False, True]
            assert by_another.exists()
        finally:
            by_another.unlink()


def test_a_semaphore_that_its_process_cannot_remove_is_removed() -> None:
    """Of multiprocessing's: libc makes it under a name of its own, which its process's maps go on to tell."""
    body = """
    import multiprocessing, os, time
    lock = multiprocessing.get_context("spawn").Lock()
    print(lock._semlock.name, multiprocessing.resource_tracker._resource_tracker._pid, flush=True)
    time.sleep(0.5)
    os.kill(multiprocessing.resource_tracker._resource_tracker._pid, 9)
    os.kill(os.getpid(), 9)
    """
    process = tethered(body)
    assert process.stdout is not None
    name, tracker = process.stdout.readline().split()
    file = HERE / f"sem.{name.strip('/')}"
    assert file.exists()
    process.wait(SOON)
    process.stdout.close()
    assert not file.exists()
    assert gone(int(tracker))


def test_what_it_has_in_shared_memory_is_looked_at_last_when_it_is_asked_to_end(files: list[Path]) -> None:
    body = f"""
    import time
    time.sleep(0.3)
    kept = open({str(files[0])!r}, "wb")
    print("has it", flush=True)
    time.sleep(60)
    """
    process = tethered(body, note_s=1e9)
    assert process.stdout is not None and process.stdout.readline() == "has it\n"
    process.terminate()
    process.wait(SOON)
    process.stdout.close()
    assert not files[0].exists()


def test_shared_memory_is_not_looked_at_more_often_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look goes through all processes of the machine."""
    looks: list[float] = []
    now = [1000.0]

    class Command:
        pid, returncode = 5, 0

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def poll(self) -> int | None:
            return 0 if now[0] > 1010 else None

    monkeypatch.setattr(tether, "_shared_memory_of", lambda group: looks.append(now[0]) or set())
    monkeypatch.setattr(tether, "_end_group", lambda process: None)
    monkeypatch.setattr(tether.subprocess, "Popen", Command)
    monkeypatch.setattr(tether.signal, "signal", lambda *_: None)
    monkeypatch.setattr(tether.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tether.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + 0.5))
    monkeypatch.setattr(sys, "argv", ["tether", str(os.getppid()), "command"])
    assert tether.main() == 0
    assert looks == [1000.0, 1002.5, 1005.0, 1007.5, 1010.0, 1010.5]


def test_nobody_is_signalled_where_the_group_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, process_group=0)
    assert tether._signal_group(process.pid, 0)
    process.communicate(b"\n", timeout=SOON)
    assert not tether._signal_group(process.pid, 0)


@pytest.mark.parametrize(("after", "within"), [(0, (0.0, 5.0)), (3, (0.1, 5.0)), (10**6, (0.3, 10.0))])
def test_a_wait_ends_with_its_condition_or_in_time(after: int, within: tuple[float, float]) -> None:
    looks = iter(range(10**7))
    began = time.monotonic()
    tether._wait(lambda: next(looks) >= after, 0.3 if after > 3 else SOON)
    assert within[0] <= time.monotonic() - began < within[1]
