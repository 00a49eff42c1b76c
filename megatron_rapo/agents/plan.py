"""What a program's process is told when it starts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

FOREIGN = Path(__file__).parent / "foreign"
_OF_THIS_PYTHON = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "PYTHONNOUSERSITE", "PYTHONSTARTUP")


@dataclass(frozen=True)
class Plan:
    """A program, and the interpreter that has its packages.

    Attributes:
        address: `module:name` of a function, or of a class with `play`.
        python: the interpreter.
        code: folders with modules, first on its path.
        arguments: of the function or class, as JSON.
        grace_s: seconds in which it may end by itself.
        option: that names the program, for errors.
    """

    address: str
    python: Path
    code: tuple[Path, ...] = ()
    arguments: str = "{}"
    grace_s: float = 5.0
    option: str = "environment.options.program"

    @property
    def command(self) -> list[str]:
        """That runs it, but for the descriptor."""
        return [str(self.python), str(FOREIGN / "worker.py")]

    @property
    def first_line(self) -> bytes:
        """What the process is told first."""
        code = [str(folder) for folder in self.code]
        told = {"address": self.address, "code": code, "arguments": json.loads(self.arguments)}
        return json.dumps(told).encode() + b"\n"

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the process: those of this one, as if the interpreter's environment were activated."""
        kept = {name: value for name, value in os.environ.items() if name not in _OF_THIS_PYTHON}
        folder = self.python.absolute().parent
        own = {"PATH": os.pathsep.join([str(folder), kept.get("PATH", os.defpath)])}
        if (folder.parent / "pyvenv.cfg").exists():
            own["VIRTUAL_ENV"] = str(folder.parent)
        return {**kept, **own, "PYTHONHASHSEED": "0"}
