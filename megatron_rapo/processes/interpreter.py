"""An interpreter of its own, seen from the process that starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

REAP_LIMIT_S = 30.0
"""Seconds for the kernel to end a process after SIGKILL."""


def start_interpreter(
    module: str,
    arguments: Sequence[str],
    descriptor: int,
    *,
    code: Sequence[Path] = (),
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    output: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Runs `python -m module descriptor arguments…`.

    It is no fork, nor multiprocessing's spawn: safe beside the threads and CUDA context of this process,
    startable from daemonic processes, and it does not import the main module of this process.

    Args:
        module: that is run.
        arguments: behind the descriptor.
        descriptor: that it inherits; no other but the standard ones is.
        code: folders with the user's own modules. What is run puts them on its path later
            (`user_code.load`), as they must not stand in for Python's own.
        environment: variables; None: those of this process. `PYTHONPATH` and the hash seed are set: the same
            modules as here, and the order of sets is the same in every process and run.
        folder: the working directory, in a session of its own; None: both are those of this process.
        output: a file for what it prints; None: where this process prints.
    """
    path = [str(Path(entry).absolute()) for entry in sys.path if entry and Path(entry) not in code]
    with ExitStack() as stack:
        printed = None if output is None else stack.enter_context(output.open("ab"))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(descriptor), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            pass_fds=[descriptor],
            cwd=folder,
            start_new_session=folder is not None,
            env={
                **(os.environ if environment is None else environment),
                "PYTHONPATH": os.pathsep.join(path),
                "PYTHONHASHSEED": "0",
            },
        )


def end_process(process: subprocess.Popen[bytes]) -> int:
    """Kills the process, and what it started, at once; its status, once it is gone."""
    started = []
    if process.poll() is None:  # later its number may be another's
        with suppress(psutil.Error):
            started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in started:
        with suppress(psutil.Error):
            child.kill()
    return process.wait(REAP_LIMIT_S)
