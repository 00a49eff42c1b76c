"""The console command in a process of its own, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

COMMAND = Path(sys.executable).with_name("megatron-rapo")
MODEL = Path(__file__).parents[2] / "examples/models/tiny-countdown"
TIMEOUT_S = 180.0
MARK = "RAPO_TEST_RUN"  # inherited by all processes of a run, so that none is overlooked

# A run that takes part in every phase, small enough to start in seconds; real rewards need a real model.
OPTIONS: dict[str, dict[str, Any]] = {
    "run": {"steps": 4},
    "model": {"path": str(MODEL), "dtype": "float32"},
    "parallel": {"timeout_s": 60.0},
    "data": {"source": "countdown", "numbers": 3, "problems": 200},
    "rollout": {
        "prompts_per_step": 4,
        "responses_per_prompt": 4,
        "max_prompt_tokens": 32,
        "max_response_tokens": 32,
        "startup_timeout_s": 60.0,
        "request_timeout_s": 60.0,
    },
    "reward": {"workers": 1},
    "algorithm": {"minibatch_prompts": 2, "max_tokens_per_microbatch": 128},
    "optimizer": {"learning_rate": 1e-3},
    "checkpoint": {"every": 1, "keep": 10},
}


def write_config(path: Path, run_directory: Path, **changes: dict[str, Any] | None) -> Path:
    """Writes OPTIONS as TOML with sections changed key by key; a key that becomes None is left out."""
    sections = {name: {**OPTIONS.get(name, {}), **(changes.get(name) or {})} for name in {*OPTIONS, *changes}}
    sections["run"]["directory"] = str(run_directory)
    lines: list[str] = []
    for name, options in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in options.items() if value is not None]
    path.write_text("\n".join(lines) + "\n")
    return path


class Command:
    """A running command."""

    def __init__(self, arguments: list[str], environment: dict[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [str(COMMAND), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", MARK: self.mark, **(environment or {})},
        )
        self.stdout = self.stderr = ""

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """The exit status, once it has ended; its output is in `stdout` and `stderr` then."""
        self.stdout, self.stderr = self.process.communicate(timeout=timeout)
        return self.process.returncode

    def wait_until(self, condition: Callable[[], bool], timeout: float = TIMEOUT_S) -> None:
        """Waits until the condition holds, while the command runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None:
                self.wait()
                raise AssertionError(f"the run ended too early:\n{self.stdout}\n{self.stderr}")
            assert time.monotonic() < deadline, "the run did not come this far"
            time.sleep(0.02)

    def processes(self) -> list[psutil.Process]:
        """All processes of the run that are alive."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def left_processes(self, within: float = 10.0) -> list[str]:
        """What is still running although the command has ended; those that are ending are waited for."""
        deadline = time.monotonic() + within
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [f"{process.pid} {process.name()}" for process in left]

    def kill(self) -> None:
        """SIGKILL to all processes of the run, as a machine that goes down."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.wait(30)


@contextmanager
def started(config: Path, *settings: str, environment: dict[str, str] | None = None) -> Iterator[Command]:
    """`megatron-rapo train`, ended at the end of the block if it has not ended by itself."""
    arguments = ["train", str(config), *(["--set", *settings] if settings else [])]
    with running(*arguments, environment=environment) as command:
        yield command


@contextmanager
def running(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Command]:
    """`megatron-rapo` with these arguments, ended at the end of the block if it has not ended by itself."""
    command = Command(list(arguments), environment)
    try:
        yield command
    finally:
        if command.process.poll() is None or command.processes():
            command.kill()


def run(config: Path, *settings: str, environment: dict[str, str] | None = None) -> Command:
    """The command after its end."""
    with started(config, *settings, environment=environment) as command:
        command.wait()
        return command


def heartbeats(directory: Path) -> list[dict[str, Any]]:
    """Each rank's last sign of life, by rank."""
    return [json.loads(path.read_text()) for path in sorted((directory / "heartbeat").glob("rank_*.json"))]


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """What must repeat from run to run."""
    return {
        name: value
        for name, value in line.items()
        if not name.startswith(("time", "throughput/", "memory/", "publish/send_s"))
    }


def checkpoints(directory: Path) -> list[str]:
    """All that stands in the folder of checkpoints."""
    return sorted(path.name for path in (directory / "checkpoints").iterdir())
