"""A file of JSON lines in which each step stands once, also after a run was resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import writing_file


class StepLines:
    """Appends one line a step: `step`, `time_s` (seconds that the run was at work until then), values.

    `history` holds the lines that stood before, oldest first.
    """

    def __init__(
        self, path: Path, resume_step: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Opens the file; lines after `resume_step` (None: all) are cut, since these steps come again.

        Raises:
            RapoError: a line before the last is no JSON object with a step.
        """
        self.history = [] if resume_step is None else read_step_lines(path, resume_step)
        if path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in self.history), encoding="utf-8")
            partial.replace(path)
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._step = self.history[-1]["step"] if self.history else -1
        self._clock = clock
        self._began = clock() - (self.history[-1]["time_s"] if self.history else 0.0)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Writes a step's line, whole and at once.

        Raises:
            ValueError: the step is not after the last one.
        """
        if step <= self._step:
            raise ValueError(f"step {step} was logged before (last: {self._step}); log each step once")
        line = {"step": step, "time_s": round(self._clock() - self._began, 3), **values}
        with writing_file(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        self._step = step

    def close(self) -> None:
        """Closes the file."""
        with writing_file(self._path):
            self._file.close()


def read_step_lines(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines up to `last_step` (None: all), oldest first; none where there is no file.

    Raises:
        RapoError: a line before the last is no JSON object with a step.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # The run was killed while it wrote this line: its step was not finished.
        try:
            values = json.loads(line)
            kept = last_step is None or values["step"] <= last_step
        except (ValueError, TypeError, KeyError) as error:
            raise RapoError(
                f"{path} line {number} is no step of a run ({error!r}); mend or remove that line"
            ) from error
        if kept:
            lines.append(values)
    return lines
