"""Real engines of each kind on a machine without a GPU, as the tools that measure them start them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher
from megatron_rapo.engines.engine import Connect
from megatron_rapo.engines.launching import Launch, Launcher
from megatron_rapo.engines.sglang.client import SGLangClient
from megatron_rapo.engines.vllm.client import VLLMClient
from megatron_rapo.engines.vllm.launcher import VLLMLauncher

ROOT = Path(__file__).parents[1]
SGLANG_PYTHON = ROOT / ".venv-sglang/bin/python"
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
CONNECTS: Mapping[str, Connect] = {"embedded": EmbeddedClient, "sglang": SGLangClient, "vllm": VLLMClient}
_INSTALLED = {"embedded": Path(sys.executable), "sglang": SGLANG_PYTHON, "vllm": VLLM_PYTHON}
VLLM_ENVIRONMENT = {
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
_VLLM_ARGUMENTS = ["--max-model-len", "2048", "--max-num-seqs", "64", "--enforce-eager"]


@dataclass(frozen=True)
class SGLangOnCpu:
    """A launcher of the server that tests/engines uses."""

    model_path: Path
    dtype: str
    name: str = "SGLang server"

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        """As `Launcher`."""
        tether = [sys.executable, "-m", "megatron_rapo.engines.tether", str(os.getpid())]
        script = [str(SGLANG_PYTHON), str(ROOT / "tests/engines/sglang_on_cpu.py")]
        options = ["--model-path", str(self.model_path), "--port", str(port), "--dtype", self.dtype]
        return Launch([*tether, *script, *options, "--skip-tokenizer-init"])


@dataclass(frozen=True)
class VLLMOnCpu:
    """vLLM as a run starts it, small, and without a tokenizer."""

    model_path: Path
    dtype: str
    name: str = "vLLM server"

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        """As `Launcher`."""
        arguments = [*_VLLM_ARGUMENTS, "--skip-tokenizer-init"]
        own = VLLMLauncher(self.model_path, self.dtype, str(VLLM_PYTHON), 1, None, arguments)
        launch = own.launch(number, port, socket_fd)
        return Launch(launch.arguments, environment={**VLLM_ENVIRONMENT, **launch.environment})


def installed() -> list[str]:
    """The kinds that this machine has; the others are told (`make sglang`, `make vllm`)."""
    for kind, python in _INSTALLED.items():
        if not python.exists():
            print(f"{kind}: not installed (make {kind})")
    return [kind for kind, python in _INSTALLED.items() if python.exists()]


def launcher_of(kind: str, model: Path, dtype: str) -> Launcher:
    """How a server of this kind is started."""
    launchers: dict[str, Launcher] = {
        "embedded": EmbeddedLauncher(model, "cpu", dtype, threads=1),
        "sglang": SGLangOnCpu(model, dtype),
        "vllm": VLLMOnCpu(model, dtype),
    }
    return launchers[kind]
