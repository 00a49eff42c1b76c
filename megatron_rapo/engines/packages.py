"""What is installed in the environment of another interpreter."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

INTERPRETER_S = 60.0  # for another environment's interpreter to start
_LOOK = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        sys.exit(print(version(name)))
    except PackageNotFoundError:
        pass
"""


@dataclass(frozen=True)
class Installed:
    """A package's version; or why there is none, as the end of a sentence about the interpreter."""

    version: str = ""
    problem: str | None = None


def installed(python: str, names: Sequence[str]) -> Installed:
    """The first of these distributions that an interpreter finds."""
    try:
        ended = subprocess.run(
            [python, "-c", _LOOK, *names], capture_output=True, text=True, timeout=INTERPRETER_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Installed(problem=f"cannot be started: {error}")
    if ended.returncode:
        return Installed(problem=f"is no Python: {ended.stderr.strip()[-200:]}")
    if not ended.stdout.strip():
        return Installed(problem=f"has no package {names[0]}")
    return Installed(ended.stdout.strip())
