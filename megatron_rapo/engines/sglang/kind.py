"""SGLang as a kind of engines."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from megatron_rapo.engines.kind import EngineKind, Served
from megatron_rapo.engines.sglang.options import RoutedOptions, SGLangOptions

if TYPE_CHECKING:
    from megatron_rapo.engines.engine import Connect, ConnectRouter
    from megatron_rapo.engines.launching import Launcher

INTERPRETER_S = 60.0  # for another environment's interpreter to start


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

    def problems(self) -> Iterator[str]:
        python = self.options.python
        finds = "import importlib.util as u, sys; sys.exit(u.find_spec('sglang') is None)"
        remedy = "set it to the interpreter of the environment that SGLang is installed in (docs/engines.md)"
        try:
            ended = subprocess.run([python, "-c", finds], capture_output=True, timeout=INTERPRETER_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            yield f"rollout.engine.python = {python!r} cannot be started: {error}; {remedy}"
            return
        if ended.returncode:
            yield f"rollout.engine.python = {python!r} has no package sglang; {remedy}"
