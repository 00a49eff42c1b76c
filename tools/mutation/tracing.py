"""Which lines of the package each test runs, in all processes that it starts.

Imports nothing but Python's own modules. A copy's `sitecustomize.py` calls `start_in_child`, so that what a
test starts is traced like itself.
Python 3.11 has no `sys.monitoring`; the tracer leaves every frame outside the package at once.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

VARIABLE = "MUTATION_TRACE"  # the folder of the package, and the file that lines are written to
ENOUGH = 1000  # calls of a function in a test: loops would take minutes
OPTIMIZED = 0x1  # flag of functions' code: modules and class bodies, which imports run, are no test's


class Tracer:
    """Writes `test, file, line`, tab-separated, the first time that a test runs a line."""

    def __init__(self, package: str, log: str) -> None:
        self._package = package + os.sep
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._test = os.environ.get("PYTEST_CURRENT_TEST", "")
        self._seen: set[tuple[CodeType, int]] = set()
        self._calls: dict[CodeType, int] = {}

    def start(self) -> None:
        """In this thread and those begun later."""
        threading.settrace(self._call)
        sys.settrace(self._call)

    def enter(self, test: str) -> None:
        """Lines are `test`'s from now on.

        Python stops to trace a thread whose trace function has raised, as where a test lets recursion end.
        """
        self.start()
        self._test = test
        self._seen.clear()
        self._calls.clear()

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename.startswith(self._package) and code.co_flags & OPTIMIZED:
            self._calls[code] = calls = self._calls.get(code, 0) + 1
            if calls <= ENOUGH:
                self._line(frame, event, argument)
                return self._line
        return None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        place = (frame.f_code, frame.f_lineno)
        if event in ("line", "call") and place not in self._seen:
            self._seen.add(place)
            file = frame.f_code.co_filename[len(self._package) :]
            with suppress(OSError):  # of a process whose files may not grow, since a test wants it so
                os.write(self._log, f"{self._test}\t{file}\t{frame.f_lineno}\n".encode())
        return self._line


def start_in_child() -> None:
    """Traces this process, where the one that started it is traced."""
    if VARIABLE in os.environ:
        package, log = os.environ[VARIABLE].split(os.pathsep)
        if Path(log).exists():
            Tracer(package, log).start()
