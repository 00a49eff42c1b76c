"""A run that is disturbed: its command, its processes, and where they are."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("megatron-rapo")
MARK = "RAPO_CRASH_TEST"
SMALL_FILES = 200_000  # bytes: less than a checkpoint's shard

CONFIG = """
[run]
directory = "{directory}"
steps = 6
[model]
path = "{model}"
dtype = "float32"
[parallel]
pipeline_parallel = 2
timeout_s = 120.0
[data]
source = "countdown"
numbers = 3
problems = 200
[rollout]
prompts_per_step = 4
responses_per_prompt = 4
max_prompt_tokens = 32
max_response_tokens = 32
startup_timeout_s = 240.0
request_timeout_s = 40.0
[reward]
workers = 1
[algorithm]
minibatch_prompts = 2
max_tokens_per_microbatch = 128
[optimizer]
learning_rate = 1e-3
[checkpoint]
every = 1
stop_grace_s = 60.0
[observe]
hang_least_s = 45.0
[evaluate]
problems = 4
samples = 2
k = [1, 2]
every = 2
"""


class Run:
    """One run's folder, and the command that works in it.

    Args:
        folder: of the run, its configuration and its output.
        clock: the library that makes its clock jump (`build_clock`), or None.
        settings: options other than CONFIG's, as `--set` takes them.
    """

    def __init__(self, folder: Path, clock: Path | None, settings: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.directory = folder / "run"
        self._config = folder / "run.toml"
        model = ROOT / "examples/models/tiny-countdown"
        self._config.write_text(CONFIG.format(directory=self.directory, model=model))
        self._settings = [word for setting in settings for word in ("--set", setting)]
        self._log = folder / "output.txt"
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._offset = folder / "clock"
        self._offset.write_bytes(bytes(8))
        if clock is not None:
            self._environment |= {"LD_PRELOAD": str(clock), "RAPO_CLOCK": str(self._offset)}
        self.process: subprocess.Popen[bytes] | None = None
        self._marks: list[str] = []  # of each start
        self.began = 0.0

    def start(self, *, small_files: bool = False) -> None:
        """The command, in the background; with `small_files` no file may grow beyond SMALL_FILES."""
        self.mark = uuid.uuid4().hex
        self._marks.append(self.mark)
        self.began = time.monotonic()
        self._heard: dict[Path, float] = {path: _mtime(path) for path in self._beats()}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(COMMAND), "train", str(self._config), *self._settings],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment, MARK: self.mark},
                preexec_fn=partial(_limit_files, SMALL_FILES) if small_files else None,
            )

    def phase(self) -> tuple[int, str]:
        """Rank 0's step and outermost phase in this start; -1 and "" before its first heartbeat."""
        path = self.directory / "heartbeat/rank_00000.json"
        if _mtime(path) == self._heard.get(path, 0.0):
            return -1, ""
        try:
            beat = json.loads(path.read_text())
        except (OSError, ValueError):
            return -1, ""
        return beat["step"], beat["phase"].partition("/")[0]

    def ended(self) -> bool:
        """Whether the command has ended."""
        assert self.process is not None
        return self.process.poll() is not None

    def members(self, who: str) -> list[psutil.Process]:
        """Processes of the run that are alive: "a rank" and "all ranks" are both all ranks."""
        assert self.process is not None
        ranks = set(self.ranks().values())
        found = []
        for process in _marked([self.mark]):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                words = " ".join(process.cmdline())
                belongs = {
                    "engine": "embedded_server" in words,
                    "verifier": "megatron_rapo.reward.worker" in words,
                    "launcher": process.pid == self.process.pid,
                    "a rank": process.pid in ranks,
                    "all ranks": process.pid in ranks,
                    "everything": True,
                }
                if belongs[who]:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, as their heartbeats have them; of an earlier start before these come."""
        beats = [json.loads(path.read_text()) for path in self._beats() if path.exists()]
        return {beat["rank"]: beat["pid"] for beat in beats}

    def jump(self, seconds: int) -> None:
        """Sets the clock of dates off by so much, in all processes of the run."""
        with self._offset.open("r+b") as file:
            file.write(ctypes.c_long(seconds))

    def left(self) -> list[psutil.Process]:
        """Processes that are alive, of earlier starts as well."""
        found = []
        for process in _marked(self._marks):
            with suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill_all(self) -> list[str]:
        """Kills whatever is left; the commands of what that was."""
        left = []
        for process in self.left():
            with suppress(psutil.NoSuchProcess):
                left.append(" ".join(process.cmdline()[:4]))
                process.kill()
        if self.process is not None:
            self.process.wait()
        return left

    def said(self) -> str:
        """All that it printed."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _beats(self) -> list[Path]:
        return sorted((self.directory / "heartbeat").glob("rank_*.json"))


def _marked(marks: Sequence[str]) -> Iterator[psutil.Process]:
    """By their environment, read here: psutil takes longer over all processes than some phases do."""
    wanted = [f"{MARK}={mark}".encode() for mark in marks]
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, psutil.NoSuchProcess):
            environment = (folder / "environ").read_bytes()
            if any(mark in environment for mark in wanted):
                yield psutil.Process(int(folder.name))


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0.0


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def wait(condition: Callable[[], bool], limit: float, pause: float = 0.005) -> bool:
    """Waits for the condition; whether it came within so many seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True
