"""SGLang as a kind of engines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from megatron_rapo.engines.kind import EngineKind, Served
from megatron_rapo.engines.packages import installed
from megatron_rapo.engines.sglang.options import RoutedOptions, SGLangOptions

if TYPE_CHECKING:
    from megatron_rapo.engines.engine import Connect, ConnectRouter
    from megatron_rapo.engines.launching import Launcher


class Routed(EngineKind):
    """What may stand behind SGLang's router."""

    options: RoutedOptions

    @property
    def router(self) -> ConnectRouter | None:
        if self.options.router is None:
            return None
        from megatron_rapo.engines.sglang.router import SGLangRouter

        return partial(SGLangRouter, url=self.options.router)


class SGLang(Routed):
    """SGLang servers."""

    Options = SGLangOptions
    options: SGLangOptions
    # What return_routed_experts answers has not been compared with a trainer.
    hides_experts = "is not asked for them: what its return_routed_experts tells is not tested here"
    # 0.5.23 attends to everything in Mistral's and Qwen's layers.
    windows = frozenset({"gemma3_text", "olmo3"})
    bash = """\
command=(
    "$ENGINE_PYTHON" -m sglang.launch_server --model-path "$MODEL" --tp-size "$GPUS_PER_ENGINE"
    --api-key "$RAPO_ENGINE_API_KEY"
)
"""

    @property
    def connect(self) -> Connect:
        from megatron_rapo.engines.sglang.client import SGLangClient

        return SGLangClient

    def launcher(self, served: Served) -> Launcher:
        from megatron_rapo.engines.sglang.launcher import SGLangLauncher

        options = self.options
        return SGLangLauncher(
            served.model_path,
            served.dtype,
            python=options.python,
            tensor_parallel=options.tensor_parallel,
            gpus=options.gpus,
            arguments=[*options.arguments, *(["--enable-memory-saver"] if served.colocated else [])],
        )

    @classmethod
    def command(cls, python: str) -> list[str]:
        return [python, "-m", "sglang.launch_server"]

    def problems(self) -> Iterator[str]:
        found = installed(self.options.python, ("sglang",))
        if found.problem is not None:
            yield (
                f"rollout.engine.python = {self.options.python!r} {found.problem}; set it to the interpreter "
                "of the environment that SGLang is installed in (docs/engines.md)"
            )
