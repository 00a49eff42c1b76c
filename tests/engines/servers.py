"""Engines as real processes, for as long as a block lasts."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import torch

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
SGLANG_PYTHON = ROOT / ".venv-sglang/bin/python"
KEY = "conformance"  # that every server demands
START_S = 300.0
END_S = 20.0
EMBEDDED, SGLANG_CPU, SGLANG_GPU = "embedded", "sglang-cpu", "sglang-gpu"


def why_not(kind: str) -> str | None:
    """The reason why there is no such engine here; None if there is."""
    if kind == SGLANG_CPU and not SGLANG_PYTHON.exists():
        return "SGLang on CPU is not installed (make sglang)"
    if kind == SGLANG_GPU and not torch.cuda.is_available():
        return "SGLang as shipped needs a CUDA device"
    if kind == SGLANG_GPU and importlib.util.find_spec("sglang") is None:
        return "SGLang as shipped is not installed (pip install -e .[sglang])"
    return None


def command(kind: str, model: Path, port: int) -> list[str]:
    """What starts such an engine, without the key."""
    if kind == EMBEDDED:
        return [
            *(sys.executable, "-m", "megatron_rapo.embedded_server"),
            "--model",
            str(model),
            f"--port={port}",
        ]
    options = ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    tether = [sys.executable, "-m", "megatron_rapo.engines.tether", str(os.getpid())]
    if kind == SGLANG_CPU:
        return [*tether, str(SGLANG_PYTHON), str(ROOT / "tests/engines/sglang_on_cpu.py"), *options]
    memory = ["--mem-fraction-static", "0.2", "--enable-memory-saver"]
    return [*tether, sys.executable, "-m", "sglang.launch_server", *options, *memory]


@contextmanager
def running(kind: str, model: Path, log: Path) -> Iterator[str]:
    """An engine of this kind on this model, ready; its address. Afterwards none of its processes is left."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command(kind, model, port), "--api-key", KEY],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process, log)
        yield url
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks first: the tether then removes what SGLang leaves in /dev/shm."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, f"the engine ended with {process.returncode}:\n{tail(log)}"
        assert time.monotonic() < deadline, f"not ready within {START_S} s:\n{tail(log)}"
        try:
            if httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)


def tail(log: Path) -> str:
    """The end of a server's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
