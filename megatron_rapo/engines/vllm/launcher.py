"""How a vLLM server is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.engines.launching import SAFE_PATH, SAFE_PATH_VARIABLE, Launch
from megatron_rapo.engines.vllm.flags import FLAGS, MODULE, environment


@dataclass(frozen=True)
class VLLMLauncher:
    """A vLLM server, from an environment of its own, tied to this process (`engines.tether`).

    Attributes:
        python: interpreter of the environment that vLLM is installed in.
        gpus: `[servers × tensor_parallel]`, a slice for each server; None leaves the choice to vLLM.
        arguments: further ones of vLLM's server.
    """

    model_path: Path
    dtype: str
    python: str
    tensor_parallel: int
    gpus: Sequence[int] | None
    arguments: Sequence[str]
    name: str = "vLLM server"

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        tether = [sys.executable, SAFE_PATH, "-m", "megatron_rapo.engines.tether", str(os.getpid())]
        command = [self.python, "-m", MODULE, "--model", str(self.model_path)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", self.dtype]
        command += ["--tensor-parallel-size", str(self.tensor_parallel), *FLAGS, *self.arguments]
        variables = {**SAFE_PATH_VARIABLE, **environment(os.environ.get("PYTHONPATH"))}
        if self.gpus is not None:
            mine = self.gpus[number * self.tensor_parallel :][: self.tensor_parallel]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        return Launch([*tether, *command], environment=variables)
