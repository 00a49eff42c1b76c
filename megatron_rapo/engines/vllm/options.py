"""The options of vLLM servers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from megatron_rapo.engines.options import OwnServers


class VLLMOptions(OwnServers):
    """vLLM servers, 0.32."""

    set_by_the_run: ClassVar[tuple[str, ...]] = (
        *("--model", "--host", "--port", "--dtype", "--tensor-parallel-size", "-tp", "--enable-scale-out"),
        *("--logprobs-mode", "--worker-extension-cls", "--weight-transfer-config", "--middleware"),
        "--api-key",
    )

    kind: Literal["vllm"] = Field("vllm", description="Names this kind of engines.")
