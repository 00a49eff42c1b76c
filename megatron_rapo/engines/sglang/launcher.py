"""How an SGLang server is started."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.engines.launching import SAFE_PATH, SAFE_PATH_VARIABLE, Launch


@dataclass(frozen=True)
class SGLangLauncher:
    """An SGLang server, from an environment of its own, tied to this process (`engines.tether`).

    Attributes:
        python: interpreter of the environment that SGLang is installed in.
        gpus: `[servers × tensor_parallel]`, a slice for each server; None leaves the choice to SGLang.
        arguments: further ones of sglang.launch_server.
    """

    model_path: Path
    dtype: str
    python: str
    tensor_parallel: int
    gpus: Sequence[int] | None
    arguments: Sequence[str]
    name: str = "SGLang server"

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        tether = [sys.executable, SAFE_PATH, "-m", "megatron_rapo.engines.tether", str(os.getpid())]
        command = [self.python, "-m", "sglang.launch_server", "--model-path", str(self.model_path)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", self.dtype]
        command += ["--tp-size", str(self.tensor_parallel), *self.arguments]
        environment = dict(SAFE_PATH_VARIABLE)
        if self.gpus is not None:
            mine = self.gpus[number * self.tensor_parallel :][: self.tensor_parallel]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        return Launch([*tether, *command], environment=environment)
