"""Embedded servers as a kind of engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_rapo.engines.embedded.options import EmbeddedOptions
from megatron_rapo.engines.kind import Served
from megatron_rapo.engines.sglang.kind import Routed

if TYPE_CHECKING:
    from megatron_rapo.engines.engine import Connect
    from megatron_rapo.engines.launching import Launcher


class Embedded(Routed):
    """Servers of `megatron_rapo.embedded_server`, which speak SGLang's contract and some more."""

    Options = EmbeddedOptions
    options: EmbeddedOptions
    hides_experts = None
    bash = """\
command=("$ENGINE_PYTHON" -m megatron_rapo.embedded_server --model "$MODEL")
((GPUS_PER_NODE == 0)) || command+=(--device cuda)
"""

    @property
    def connect(self) -> Connect:
        from megatron_rapo.engines.embedded.client import EmbeddedClient

        return EmbeddedClient

    def launcher(self, served: Served) -> Launcher:
        from megatron_rapo.engines.embedded.launcher import EmbeddedLauncher

        options = self.options
        return EmbeddedLauncher(served.model_path, options.device, served.dtype, threads=options.threads)

    @classmethod
    def command(cls, python: str) -> list[str]:
        return [python, "-m", "megatron_rapo.embedded_server"]

    def problems(self) -> Iterator[str]:
        import torch

        if self.options.device == "cuda" and not torch.cuda.is_available():
            yield 'rollout.engine.device = "cuda" needs a GPU, and torch sees none; set "cpu", or give urls'
