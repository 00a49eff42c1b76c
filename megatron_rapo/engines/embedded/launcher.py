"""How an embedded server is started."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_rapo.engines.launching import SAFE_PATH, Launch


@dataclass(frozen=True)
class EmbeddedLauncher:
    """The embedded server. It inherits its socket, and watches this process by itself."""

    model_path: Path
    device: str
    dtype: str
    threads: int
    name: str = "embedded server"

    def launch(self, number: int, port: int, socket_fd: int) -> Launch:
        arguments = [sys.executable, SAFE_PATH, "-m", "megatron_rapo.embedded_server"]
        arguments += ["--model", str(self.model_path), "--device", self.device, "--dtype", self.dtype]
        arguments += ["--threads", str(self.threads)]
        arguments += ["--socket-fd", str(socket_fd), "--parent-pid", str(os.getpid())]
        return Launch(arguments, inherited_socket=socket_fd)
