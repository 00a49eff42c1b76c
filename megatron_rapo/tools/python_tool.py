"""A Python interpreter that keeps its variables for as long as its process lives: one episode."""

from __future__ import annotations

import ast
import io
import linecache
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

_MOST_OUTPUT = 1_000_000  # characters that are kept of what is printed; a reply has less
_FILE = "<code>"

_variables: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}


def python(code: str) -> str:
    """Runs Python code, and returns what it prints and the value of its last line. Variables are kept.

    Args:
        code: The code.
    """
    printed = _Printed()
    linecache.cache[_FILE] = (len(code), None, code.splitlines(keepends=True), _FILE)
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            _run(code, printed)
        except MemoryError:
            raise
        except BaseException as error:  # SystemExit as well: the code's own
            printed.write(_told(error))
    return printed.getvalue()


python.keeps_state = python.runs_code = True  # type: ignore[attr-defined]


def _run(code: str, printed: _Printed) -> None:
    tree = ast.parse(code, _FILE)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, _FILE, "exec"), _variables)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), _FILE, "eval"), _variables)
        if value is not None:
            printed.write(f"{value!r}\n")


def _told(error: BaseException) -> str:
    """The traceback, from the code's own first line on."""
    told = traceback.TracebackException.from_exception(error)
    frames = list(told.stack)
    own = next((place for place, frame in enumerate(frames) if frame.filename == _FILE), len(frames))
    told.stack = traceback.StackSummary.from_list(frames[own:])
    return "".join(told.format())


class _Printed(io.StringIO):
    """Keeps the beginning of what is written, and counts it all as written."""

    def write(self, text: str) -> int:
        super().write(text[: max(0, _MOST_OUTPUT - self.tell())])
        return len(text)
