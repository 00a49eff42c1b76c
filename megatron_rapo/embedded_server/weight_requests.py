"""Requests for weights and memory that the embedded server takes, in SGLang's words."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator

from megatron_rapo.embedded_server.engine import MemoryTag
from megatron_rapo.embedded_server.protocol import StrictRequest
from megatron_rapo.wire.slices import Slice

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
GROUP = "weight_update_group"  # SGLang's default


class _Update(StrictRequest):
    """`flush_cache` is granted either way: nothing is cached beyond a request."""

    weight_version: str | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False


class UpdateFromDiskRequest(_Update):
    """A safetensors folder."""

    model_path: str


class UpdateFromDistributedRequest(_Update):
    """Tensors that the trainer broadcasts in this order, one by one or as one bucket."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = GROUP
    load_format: Literal["flattened_bucket"] | None = None
    selector: Literal["all", "target"] = "all"

    @field_validator("dtypes")
    @classmethod
    def _known(cls, dtypes: list[str]) -> list[str]:
        for name in dtypes:
            if name not in DTYPES:
                raise ValueError(f"{name!r} is none of {', '.join(DTYPES)}")
        return dtypes

    @model_validator(mode="after")
    def _of_one_length(self) -> UpdateFromDistributedRequest:
        if not len(self.names) == len(self.dtypes) == len(self.shapes):
            raise ValueError(
                f"{len(self.names)} names, {len(self.dtypes)} dtypes, {len(self.shapes)} shapes; "
                "send one of each a tensor"
            )
        if len(set(self.names)) < len(self.names):
            raise ValueError("a name stands there twice")
        return self


class UpdateFromTensorRequest(_Update):
    """One pickle, in base64, for each tensor-parallel rank: for one."""

    serialized_named_tensors: list[str] = Field(min_length=1, max_length=1)
    load_format: Literal["flattened_bucket"] | None = None
    selector: Literal["all", "target"] = "all"


class SliceMessage(StrictRequest):
    """What one trainer rank sends at once: slices of name, dimension (null: whole), start, stop."""

    source: int = Field(ge=0)
    engine_rank: Literal[0] = 0
    slices: list[Slice] = Field(min_length=1)


class UpdateFromShardsRequest(_Update):
    """Slices of tensors, sent by several trainer ranks over a group: an extension of SGLang's contract."""

    group_name: str = GROUP
    dtype: str
    messages: list[SliceMessage]

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(f"{dtype!r} is none of {', '.join(DTYPES)}")
        return dtype


class InitGroupRequest(StrictRequest):
    """A process group whose first ranks are the trainer's."""

    master_address: str
    master_port: int = Field(gt=0, lt=2**16)
    rank_offset: int = Field(ge=1)
    world_size: int = Field(ge=2)
    group_name: str = Field(GROUP, min_length=1)
    backend: Literal["nccl", "gloo"] = "nccl"


class DestroyGroupRequest(StrictRequest):
    """Leaves it."""

    group_name: str = GROUP


class BeginUpdateRequest(StrictRequest):
    """There is one model, which is the target."""

    selector: Literal["all", "target"] = "all"


class EndUpdateRequest(StrictRequest):
    """Without fields."""


class RenameRequest(StrictRequest):
    """The weights' new name."""

    new_version: str
    abort_all_requests: bool = True


class MemoryRequest(StrictRequest):
    """Which memory; None or nothing is all."""

    tags: list[MemoryTag] | None = None

    @property
    def named(self) -> list[MemoryTag]:
        """The tags that are meant."""
        return self.tags or ["weights", "kv_cache"]
