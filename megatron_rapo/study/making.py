"""One run made: its ordinary commands, one after the other, and the table of what it came to."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import megatron_rapo
from megatron_rapo.errors import RapoError
from megatron_rapo.record.versions import read_versions
from megatron_rapo.study.attempts import Attempt, add_attempt, read_attempts
from megatron_rapo.study.plan import PlannedRun, told
from megatron_rapo.study.results import collect
from megatron_rapo.study.standing import check_folder

LOGS = "logs"
TOLD_LINES = 12  # of a failed command's log
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Stopper:
    """Hands the request to stop to all commands that run. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.asked = False

    def ask(self) -> None:
        """Commands save their step and end; asked again, they end at once (docs/resume.md)."""
        self.asked = True
        with self._lock:
            for process in self._running:
                process.send_signal(signal.SIGTERM)

    def watch(self, process: subprocess.Popen[bytes]) -> int:
        """The exit status of a command, once it has ended."""
        with self._lock:
            self._running.add(process)
            if self.asked:
                process.send_signal(signal.SIGTERM)
        try:
            return process.wait()
        finally:
            with self._lock:
                self._running.discard(process)


def make(run: PlannedRun, folder: Path, stopper: Stopper) -> bool:
    """Runs its commands, which go on where earlier ones were stopped, and writes its result.

    Returns:
        Whether it is there; else why not stands in its attempts.

    Raises:
        RapoError: its folder is of another configuration, or its result cannot be made of it.
    """
    check_folder(run)
    log = folder / LOGS / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    status = 0
    with log.open("ab") as output:
        for command in run.commands():
            output.write(f"\n$ {told(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [*_program(), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal comes through `ask` alone
                preexec_fn=_end_with_parent,
            )
            status = stopper.watch(process)
            if status:
                break
    seconds = time.monotonic() - began
    words = "" if not status else f"status {status}\n" + "\n".join(_last_lines(log))
    add_attempt(
        folder, run.name, Attempt(started, round(seconds, 2), status, bool(status) and stopper.asked, words)
    )
    if status:
        return False
    spent = sum(attempt.seconds for attempt in read_attempts(folder, run.name))
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    collect(run, spent, commit=commit(), finished=finished, versions=_versions(run)).write(folder)
    return True


def commit() -> str | None:
    """The commit of the source that runs, with a + where files differ from it; None where it is in none."""
    source = Path(megatron_rapo.__file__).parent

    def git(*words: str) -> str | None:
        try:
            found = subprocess.run(
                ["git", "-C", str(source), *words], capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return found.stdout.strip()

    head = git("rev-parse", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")


def _versions(run: PlannedRun) -> dict[str, str]:
    starts = read_versions(run.directory)
    if starts:
        return dict(starts[-1].versions)
    from megatron_rapo.evaluation.manifest import Manifest

    if run.judged is None:
        raise RapoError(f"{run.directory} has neither versions.jsonl nor an evaluation; run the study again")
    return Manifest.read(run.judged).versions


def _program() -> Sequence[str]:
    """This installation's command, whatever PATH says."""
    return [sys.executable, "-c", "import sys; from megatron_rapo.cli import main; sys.exit(main())"]


def _end_with_parent() -> None:
    """In the child: SIGTERM once its parent is gone, so that it saves its step and lets the folder go."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8_192))
        text = file.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-TOLD_LINES:]
