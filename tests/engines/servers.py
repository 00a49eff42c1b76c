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

from megatron_rapo.engines.vllm.flags import FLAGS, MODULE
from megatron_rapo.engines.vllm.flags import environment as vllm_environment
from megatron_rapo.wire.access import API_KEY_VARIABLE
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
SGLANG_PYTHON = ROOT / ".venv-sglang/bin/python"
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
KEY = "conformance"  # that every server demands
START_S = 300.0
END_S = 20.0
EMBEDDED, SGLANG_CPU, SGLANG_GPU, VLLM_CPU = "embedded", "sglang-cpu", "sglang-gpu", "vllm-cpu"
SPEAK_SGLANG = [EMBEDDED, SGLANG_CPU, SGLANG_GPU]
CONTEXT = 2048  # tokens, of servers that are told

# What vLLM wants on a small machine without a GPU: no compilation, no binding to cores, 1 GiB for its cache.
VLLM_ON_CPU = {
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
VLLM_ARGUMENTS = ["--max-model-len", str(CONTEXT), "--max-num-seqs", "64", "--enforce-eager"]


def why_not(kind: str) -> str | None:
    """The reason why there is no such engine here; None if there is."""
    if kind == SGLANG_CPU and not SGLANG_PYTHON.exists():
        return "SGLang on CPU is not installed (make sglang)"
    if kind == VLLM_CPU and not VLLM_PYTHON.exists():
        return "vLLM on CPU is not installed (make vllm)"
    if kind == SGLANG_GPU and not torch.cuda.is_available():
        return "SGLang as shipped needs a CUDA device"
    if kind == SGLANG_GPU and importlib.util.find_spec("sglang") is None:
        return "SGLang as shipped is not installed (pip install -e .[sglang])"
    return None


def command(kind: str, model: Path, port: int, *further: str) -> list[str]:
    """What starts such an engine, with further arguments of its own."""
    if kind == EMBEDDED:
        return [
            *(sys.executable, "-m", "megatron_rapo.embedded_server"),
            "--model",
            str(model),
            f"--port={port}",
            f"--api-key={KEY}",
            *further,
        ]
    tether = [sys.executable, "-m", "megatron_rapo.engines.tether", str(os.getpid())]
    if kind == VLLM_CPU:
        options = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port)]
        return [*tether, str(VLLM_PYTHON), "-m", MODULE, *options, *FLAGS, *VLLM_ARGUMENTS, *further]
    options = ["--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    options += ["--api-key", KEY, *further]
    if kind == SGLANG_CPU:
        return [*tether, str(SGLANG_PYTHON), str(ROOT / "tests/engines/sglang_on_cpu.py"), *options]
    memory = ["--mem-fraction-static", "0.2", "--enable-memory-saver"]
    return [*tether, sys.executable, "-m", "sglang.launch_server", *options, *memory]


def environment(kind: str) -> dict[str, str]:
    """What it finds in its environment; of SGLang the key is an argument."""
    found = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if kind == VLLM_CPU:
        found |= {**VLLM_ON_CPU, **vllm_environment(os.environ.get("PYTHONPATH")), API_KEY_VARIABLE: KEY}
    return found


@contextmanager
def running(kind: str, model: Path, log: Path, *further: str) -> Iterator[str]:
    """An engine of this kind on this model, ready; its address. Afterwards none of its processes is left."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(kind, model, port, *further),
            cwd=ROOT,
            env=environment(kind),
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
