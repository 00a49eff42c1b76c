"""What code outside answered since the newest checkpoint: a step that is done again hears the same.

    RUN/answers/step_000012-000.jsonl    step 12, the share of head 0: what it is of, then a line an answer

A line is written as its answer comes, in one piece, so that a killed process leaves whole lines and perhaps a
torn last one, which is dropped. Lines of another configuration of the environment, or of other code behind
it, are not read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rapo import __version__
from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.fingerprint import fingerprint, in_json
from megatron_rapo.record.configurations import Configuration

FOLDER = "answers"
MOST_BYTES = 2**30  # that a head keeps of a step


class AnswerLog:
    """A head's answers, by step."""

    def __init__(self, config: RunConfig, head: int) -> None:
        self._folder = config.run.directory / FOLDER
        self._head = head
        self._made_by = _made_by(config)
        self._open: dict[int, StepAnswers] = {}
        self._steps = 1 + config.rollout.max_staleness  # that may be sampled at a time

    def of_step(self, step: int) -> StepAnswers:
        """Those of a step: what was kept of it before, by whichever head, and what comes now."""
        for done in [number for number in self._open if number <= step - self._steps]:
            self._open.pop(done).close()
        if step not in self._open:
            self._open[step] = StepAnswers(self._folder, step, self._head, self._made_by)
        return self._open[step]

    def close(self) -> None:
        """Closes their files."""
        for answers in self._open.values():
            answers.close()


class StepAnswers:
    """The answers of a step (`environments.recorded.Answers`)."""

    def __init__(self, folder: Path, step: int, head: int, made_by: str) -> None:
        """Reads what there is; a file is made with the first answer."""
        self.step = step
        self._own = folder / f"step_{step:06d}-{head:03d}.jsonl"
        self._header = {"made_by": made_by}
        self._known: dict[str, Any] = {}
        for path in sorted(folder.glob(f"step_{step:06d}-*.jsonl")):
            self._known |= dict(pair for pair, _ in _entries(path, self._header))
        self._file: int | None = None
        self._bytes = 0

    def find(self, key: str) -> tuple[bool, Any]:
        """Whether there is one of that key, and the answer."""
        return key in self._known, self._known.get(key)

    def keep(self, key: str, answer: Any) -> None:
        """Keeps what JSON can write. Beyond `MOST_BYTES` nothing more is kept, which is told once.

        Raises:
            RapoError: the disk is full or broken.
        """
        line = _line([key, answer])
        if self._bytes + len(line) > MOST_BYTES:
            if self._bytes <= MOST_BYTES:
                print(
                    f"warning: {self._own} has {MOST_BYTES:,} bytes; further answers of step {self.step} are "
                    "not kept, and are asked for again should the step be done again",
                    file=sys.stderr,
                    flush=True,
                )
                self._bytes = MOST_BYTES + 1
            return
        try:
            self._write(line)
        except OSError as error:
            raise RapoError(
                f"{self._own} cannot be written to: {error.strerror or error}; make room there or mend it, "
                "and run the same command again"
            ) from error
        self._known[key] = answer

    def close(self) -> None:
        """Closes its file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: bytes) -> None:
        if self._file is None:
            self._file, self._bytes = self._opened()
        written = os.write(self._file, line)
        if written < len(line):  # the disk is full: the next attempt tells why
            os.write(self._file, line[written:])
        self._bytes += len(line)

    def _opened(self) -> tuple[int, int]:
        """Its own file, and the bytes in it: after its last whole line, or begun anew."""
        self._own.parent.mkdir(exist_ok=True)
        whole = max((end for _, end in _entries(self._own, self._header)), default=0)
        file = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(file, whole)
        header = b"" if whole else _line(self._header)
        os.write(file, header)
        return file, whole + len(header)


def drop_until(run: Path, step: int) -> None:
    """Removes those of steps that a checkpoint has."""
    for path in (run / FOLDER).glob("step_*.jsonl"):
        number = path.name.removeprefix("step_").partition("-")[0]
        if number.isdigit() and int(number) <= step:
            path.unlink(missing_ok=True)


def _made_by(config: RunConfig) -> str:
    """What answers hang on, beside what is asked: the environment's options, and the code that they name."""
    now = Configuration.of(config, 0)
    chosen = [
        {name: value for name, value in of.items() if name.startswith("environment.")}
        for of in (now.options, now.code)
    ]
    return fingerprint([__version__, *map(in_json, chosen)])


def _entries(path: Path, header: dict[str, str]) -> Iterator[tuple[tuple[str, Any], int]]:
    """Each key with its answer, and where its line ends, up to the first line that is not whole."""
    end = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                found: Any = json.loads(line) if line.endswith(b"\n") else None
                end += len(line)
                if number == 0:
                    if found != header:
                        return
                    continue
                key, answer = found
                yield (key, answer), end
    except FileNotFoundError:
        return
    except (ValueError, TypeError):  # torn: the machine was lost, or the process was killed
        return


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"
