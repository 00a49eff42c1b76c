"""The options of how weights get from the trainer to the engines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_rapo.section import PositiveFloat, PositiveInt, Section


class Weights(Section):
    """How the engines get the policy's weights after each step, and how closely they are looked at there."""

    transport: Literal["distributed", "tensor", "shard", "disk"] = Field(
        "distributed",
        description="`distributed`: broadcast over NCCL (GPU) or gloo (CPU), for engines on devices of "
        "their own. `tensor`: by handle (CUDA IPC, shared memory), for engines on the trainer's machine, "
        "also on its GPUs. `shard`: each rank's own shard to the engine ranks that need it, at embedded "
        "servers; SGLang and vLLM, which take whole tensors only, are sent to as by `distributed`. `disk`: a "
        "HF model directory under run.directory, which the engines must see.",
    )
    bucket_bytes: PositiveInt = Field(
        512 * 2**20,
        description="Memory for tensors on their way, on each sending rank. A larger tensor goes alone.",
    )
    probe_tolerance: PositiveFloat | None = Field(
        None,
        description="Largest allowed mean |engine − trainer log-prob| of the greedy probe after each "
        "publication, in nats. Default: 0.05 for bfloat16, 0.001 for float32.",
    )

    def without_effect(self) -> dict[str, str]:
        return {"bucket_bytes": 'transport is "disk"'} if self.transport == "disk" else {}
