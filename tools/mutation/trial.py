"""Tests in a forked child of this process, on a copy of the repository, where a file may hold a fault."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# Imported once, before any child is forked; the package itself is imported by each child anew.
PRELOADED = [
    *("torch", "torch.distributed", "transformers", "safetensors.torch"),
    *("megatron.core.optimizer", "megatron.core.models.gpt", "megatron.core.dist_checkpointing"),
    *(
        "pydantic",
        "httpx",
        "fastapi",
        "uvicorn",
        "scipy.stats",
        "pyarrow.parquet",
        "math_verify",
        "rich.console",
    ),
    *("hypothesis", "pytest"),
]


def preload() -> None:
    """Imports what most tests need, so that a child does not."""
    with warnings.catch_warnings(action="ignore"):
        for name in PRELOADED:
            importlib.import_module(name)


class Copy:
    """A copy of the repository's files: whatever happens in it, the working tree stays as it is."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.root, self.directory = root, directory
        listed = subprocess.check_output(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, text=True
        )
        for name in filter(None, listed.split("\0")):
            target = directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (root / name).is_symlink() or (root / name).is_file():  # not what git still lists, but is gone
                shutil.copy2(root / name, target, follow_symlinks=False)
        (directory / "sitecustomize.py").write_text(
            "from tools.mutation.tracing import start_in_child\n\nstart_in_child()\n"
        )
        subprocess.run([sys.executable, "-m", "compileall", "-q", directory / "megatron_rapo"], check=True)

    def write(self, file: str, source: bytes) -> None:
        """Another source of one file; bytecode of the former goes."""
        path = self.directory / file
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()
        path.write_bytes(source)


def run_tests(
    tests: Sequence[str],
    plugins: Sequence[Any] = (),
    *,
    to_the_first_failure: bool = True,
    limit_s: float | None = None,
) -> int:
    """In a child: pytest's status of these tests, in this order; one that takes longer than a limit fails."""
    import hypothesis
    import pytest

    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # the smallest example is not asked for
    hypothesis.settings.register_profile("mutation", deadline=None, database=None, phases=phases)
    hypothesis.settings.load_profile("mutation")
    options = [
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "--hypothesis-seed=0",
        f"--basetemp={os.environ['TMPDIR']}/pytest",
    ]
    if to_the_first_failure:
        options.append("-x")
    if limit_s is not None:
        options.append(f"--timeout={limit_s}")
    return int(pytest.main([*options, *tests], plugins=list(plugins)))


@dataclass(frozen=True)
class Job:
    """What a child is to do in a copy, of what, and how long it may take."""

    subject: Any
    work: Callable[[Copy], int]
    limit_s: float


def run_jobs(
    copies: Sequence[Copy],
    jobs: Iterable[Job],
    prepare: Callable[[Copy, Any], None],
    done: Callable[[Copy, Any, int | None], None],
) -> None:
    """Runs jobs in children, one in each copy at a time.

    Args:
        copies: where.
        jobs: in the order of their beginning.
        prepare: is told copy and subject before a job begins.
        done: is told copy, subject and the child's status; None where it was ended at its limit.
    """
    queue = iter(jobs)
    running: dict[Copy, tuple[Job, int, float]] = {}
    idle = list(copies)
    try:
        while True:
            while idle and (job := next(queue, None)):
                copy = idle.pop()
                prepare(copy, job.subject)
                running[copy] = (job, _fork(copy, job.work), time.monotonic() + job.limit_s)
            if not running:
                return
            time.sleep(0.02)
            for copy, (job, pid, deadline) in list(running.items()):
                late = time.monotonic() > deadline
                if late:
                    _end_group(pid)
                ended, status = os.waitpid(pid, 0 if late else os.WNOHANG)
                if ended:
                    _end_group(pid)
                    del running[copy]
                    idle.append(copy)
                    done(copy, job.subject, None if late else os.waitstatus_to_exitcode(status))
    finally:
        for _, pid, _ in running.values():
            _end_group(pid)


def _end_group(pid: int) -> None:
    """Ends a child's process group, and what it started outside of that."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _fork(copy: Copy, work: Callable[[Copy], int]) -> int:
    """Forks; the child runs `work` in the copy, its output in the copy's `output.txt`. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        output = os.open(copy.directory / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(copy.directory)
        temporary = copy.directory.parent / "tmp"  # as tests are used to: outside of the working directory
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        os.environ.update(PYTHONPATH=str(copy.directory), TMPDIR=str(temporary))
        sys.path.insert(0, str(copy.directory))
        sys.argv = ["pytest"]
        vars(sys.modules["__main__"]).pop("__file__", None)  # else processes that a test spawns import it
        status = work(copy)
    finally:
        os._exit(status)
    return 0
